# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""What a run records and resumes from, the same on all processes: its journal and its checkpoint."""

import errno
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput
from transformers.utils import logging
from trl import DistillationTrainer

from omniopd_trl.errors import RESUME, DataError, OmniOPDError, first_line
from omniopd_trl.journal.file import journal_path
from omniopd_trl.journal.reader import identity_of_first
from omniopd_trl.journal.recorder import save_tokenizer
from omniopd_trl.models.reference import Reference
from omniopd_trl.trainer.checkpoints import EndsAtLastStep, check_adapters, resume_point, state_of, unmark
from omniopd_trl.trainer.distributed import Failure, on_every_process, raise_together, stop, together
from omniopd_trl.trainer.fingerprint import fingerprint, replay_key
from omniopd_trl.trainer.omniopd_config import OmniOPDConfig

logger = logging.get_logger(__name__)

# A full or failing disk, a quota, a limit on the size of files, a disk that can only be read.
_DISK = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EFBIG, errno.EROFS)


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


@contextmanager
def publishable(args: TrainingArguments, reference: Reference, student: PreTrainedModel) -> Iterator[None]:
    """Context in which a student is saved without the token of `args` and the frozen copy of its adapter.

    Both would be pushed: the token in `training_args.bin`, the copy as another adapter.
    """
    token, args.hub_token = args.hub_token, None
    try:
        with reference.left_out(student):
            yield
    finally:
        args.hub_token = token


@contextmanager
def saving(folder: str | os.PathLike[str] | None) -> Iterator[None]:
    """Context in which a folder is saved. What a full or failing disk raises becomes one line.

    Raises:
        OmniOPDError: when the disk is full or read-only, or fails. Other errors are raised unchanged.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch and safetensors raise types of their own, without a number.
        of_disk = isinstance(error, SafetensorError) or "PytorchStreamWriter" in str(error)
        if not of_disk and getattr(error, "errno", None) not in _DISK:
            raise
        raise OmniOPDError(
            f"{str(folder)!r} cannot be saved ({first_line(error).rstrip('.')}). Check that the disk has room and can "
            f"be written to, then {RESUME}."
        ) from error


class Records(EndsAtLastStep, DistillationTrainer):
    """The hooks of [`OmniOPDTrainer`] for checkpoints and the journal, and for resuming from both."""

    _whole_checkpoint: Path | None  # the last one that was saved, or loaded

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train the student, as [`~transformers.Trainer.train`] does.

        Args:
            resume_from_checkpoint: `True` continues from the last checkpoint in `output_dir`, or from step 0 if there
                is none yet; a path continues from that checkpoint. Both replay what the journal holds from there on.
                Otherwise the run starts over: it replays nothing, and what was spent before counts.

        Raises:
            DataError: for `True`, when `output_dir` holds neither a checkpoint nor a journal; when the checkpoint has
                adapters and the student has none, or the other way round.
        """
        checkpoint = None
        if resume_from_checkpoint:
            checkpoint = checkpoint_to_resume(resume_from_checkpoint, str(self.args.output_dir), self.accelerator)
        if checkpoint:
            with together(self.args.process_index):
                check_adapters(Path(checkpoint), self.model)
        self._reset_step(checkpoint)
        if checkpoint:
            self.objective.reference.load(Path(checkpoint), self.accelerator.unwrap_model(self.model))
        try:
            with self._recording(replay=bool(resume_from_checkpoint)):
                warn_about_separate_folders(self.args, self.accelerator)
                return super().train(checkpoint, *args, **kwargs)
        finally:
            self.is_in_train = False  # `Trainer` leaves it set when training is interrupted
            self.step_audits.release()

    def _save_checkpoint(self, model, trial):
        """Save a checkpoint. The trainer's state is written last and marks it as complete: remove an old one first."""
        folder = self._checkpoint_folder()
        with saving(folder):
            if self.args.should_save:
                unmark(folder)
                if not self.args.save_only_model:
                    self.objective.reference.save(folder)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
        self._whole_checkpoint = folder.resolve()

    def _save(self, output_dir=None, state_dict=None):
        student = self.accelerator.unwrap_model(self.model)
        with saving(output_dir or self.args.output_dir), publishable(self.args, self.objective.reference, student):
            super()._save(output_dir, state_dict)

    def _save_rng_state(self, output_dir):
        """Wait for all processes after the last file of each, before the trainer's state marks the checkpoint."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()

    def _checkpoint_folder(self) -> Path:
        return Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"

    @contextmanager
    def _recording(self, replay: bool = False) -> Iterator[None]:
        """Context with an open journal, if `save_audits` is set. Every process has to enter it at the same point.

        Args:
            replay: whether records of earlier runs are replayed.

        Raises:
            JournalError: on every process, when the journal of one cannot be used.
        """
        if not self.args.save_audits or self._recorder.journal is not None:
            yield
            return
        args, rank, key = self.args, self.accelerator.process_index, self._replay_key()
        opened = self._recorder.open(
            journal_path(args.output_dir, rank),
            self.teacher.budget,
            replay=replay,
            run=str(args.run_name or Path(args.output_dir).name),
            teacher=self.teacher.name,
            fingerprint=fingerprint(key),
            settings=key,
            rank=rank,
            num_processes=self.accelerator.num_processes,
        )
        with ExitStack() as stack:
            on_every_process(lambda: stack.enter_context(opened), rank)
            if self.accelerator.is_main_process:
                save_tokenizer(self._tokenizer, journal_path(self.args.output_dir, 0).parent)
            try:
                yield
            finally:
                self.step_audits.cancel()  # audits write to the journal, so cancel them before it is closed

    def _replay_key(self) -> dict[str, Any]:
        """The settings that the journal holds. Records of other settings are not replayed."""
        return replay_key(
            self.args,
            self.train_dataset,
            self.model,
            self.teacher,
            self.auditor.similarity,
            self.step_audits.custom_weights,
            () if self.verifier is None else self.verifier.functions,
        )

    def _stop(self, failure: Failure) -> Exception:
        """Save a checkpoint and return the error to raise. Every process has to call it, or the others would wait."""
        self.step_audits.cancel()  # spend nothing more
        text, where = failure.text.rstrip(), ""
        text += "" if text.endswith((".", "!", "?", "…")) else "."
        if self.is_in_train:
            # Do not overwrite a complete checkpoint of this step.
            if self._whole_checkpoint != self._checkpoint_folder().resolve():
                try:
                    self._save_checkpoint(self.model, trial=None)
                except OmniOPDError as error:  # of this process alone
                    message = f"Stopped at step {self.state.global_step}: {text} {error}"
                    return stop(failure._replace(is_ours=False), message)
            # A launcher ends all processes as soon as one has ended, and another may still be writing.
            self.accelerator.wait_for_everyone()
            where = f" A checkpoint is in {self.args.output_dir}; fix the cause and resume from it."
        return stop(failure, f"Stopped at step {self.state.global_step}: {text}{where}")
