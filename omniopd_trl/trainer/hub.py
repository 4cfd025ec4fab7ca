# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Push a run to the Hub: the student, its card and its checkpoints, and no other file of the output folder.

`Trainer` uploads every file in `output_dir`. There, a run also keeps what a paid teacher wrote, and users keep other
files. A push therefore has its own folder, `output_dir/_push/STEP`, with exactly the files to upload. It is removed
after the push. After a failed push it stays, and one command repeats the push.
"""

import os
import shlex
import shutil
import textwrap
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

from huggingface_hub import CommitInfo
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from tenacity import retry, retry_if_exception, stop_after_attempt, wait_exponential
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import HubStrategy
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, PushInProgress, hf_api, logging
from trl import DistillationTrainer

from omniopd_trl.errors import HubError, first_line
from omniopd_trl.teachers.remote.failures import redact
from omniopd_trl.trainer.model_card import CARD, FIGURE, complete_card, dataset_id_of
from omniopd_trl.trainer.omniopd_config import OmniOPDConfig

logger = logging.get_logger(__name__)

# In `output_dir`. The trainers of transformers do not upload folders whose name begins with an underscore, either.
PUSH_FOLDER = "_push"
# Smaller files are copied. The trainer rewrites some of them in place, possibly while they are uploaded.
_LINKED_BYTES = 2**20
_TRIES = 3


def open_repo(args: OmniOPDConfig, token: str | None = None, private: bool | None = None) -> str:
    """Create the repository of a run, and the branch of `hub_revision`, unless they exist.

    Args:
        args: configuration of the run.
        token: token with write access. Defaults to `args.hub_token`, then to that of the environment.
        private: whether a new repository is private. Defaults to `args.hub_private_repo`.

    Returns:
        The id of the repository, with its namespace.

    Raises:
        HubError: when the Hub refuses it or cannot be reached, and when a repository that must be private is public.
    """
    token = token or args.hub_token
    private = args.hub_private_repo if private is None else private
    name = args.hub_model_id or Path(args.output_dir).absolute().name
    revision = args.hub_revision
    try:
        repo_id: str = _retried(hf_api().create_repo)(name, token=token, private=private, exist_ok=True).repo_id
        is_public = bool(private) and not _retried(hf_api().model_info)(repo_id, token=token).private
        if revision is not None and not revision.startswith("refs/"):
            _retried(hf_api().create_branch)(repo_id, branch=revision, token=token, exist_ok=True)
    except Exception as error:
        raise HubError(f"The run cannot be pushed to the Hub as {name!r}: {_cause(error)} {_advice(error)}") from error
    if is_public:
        raise HubError(
            f"hub_private_repo=True, and the repository {repo_id} exists and is public. Make it private in its "
            "settings, or set `hub_model_id` to another name."
        )
    return repo_id


def _status(error: BaseException) -> int | None:
    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def _may_pass(error: BaseException) -> bool:
    status = _status(error)
    if status is not None:
        return status == 429 or status >= 500
    return isinstance(error, Exception) and not isinstance(error, ValueError | OfflineModeIsEnabled)


_retried = retry(
    retry=retry_if_exception(_may_pass), stop=stop_after_attempt(_TRIES), wait=wait_exponential(max=8), reraise=True
)


def _cause(error: Exception) -> str:
    """The cause of a failed push in one line, without the URLs of uploads, which are signed."""
    if isinstance(error, HfHubHTTPError):
        reason = f"HTTP {error.response.status_code} {error.response.reason_phrase}"
        text = f"{reason}, {first_line(Exception(error.server_message))}" if error.server_message else reason
    else:
        text = first_line(error)
    return redact(text).rstrip(".") + "."


def _advice(error: Exception) -> str:
    if _status(error) in (401, 403):
        return "Set the environment variable HF_TOKEN to a token with write access, or log in with `hf auth login`."
    return "Fix the cause, or set push_to_hub=False and push the run later."


# ---- The files of a push ----


def stage(
    args: OmniOPDConfig,
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    step: int,
    checkpoint: str | None = None,
) -> Path:
    """Collect the files of a push. Weights take no space: they are hard links where the file system has them.

    Args:
        args: configuration of the run. The card and its figure are in `args.output_dir`.
        folder: folder that the trainer saved the model in: `args.output_dir`, or a checkpoint.
        model: the student.
        tokenizer: its tokenizer.
        step: optimizer step, which names the folder.
        checkpoint: path in the repository for all files of `folder`; `None` leaves the checkpoint out.

    Returns:
        The folder to upload.

    Raises:
        HubError: when a file cannot be read or written, for example on a full disk.
    """
    output_dir = Path(args.output_dir)
    files = {name: folder / name for name in _model_files(folder, model, tokenizer)}
    files |= {name: output_dir / name for name in (CARD, FIGURE) if (output_dir / name).exists()}
    if checkpoint is not None:
        # A checkpoint of adapters has a card of PEFT, with the local path of the base model.
        saved = [path for path in folder.rglob("*") if path.is_file() and path.name != CARD]
        files |= {f"{checkpoint}/{path.relative_to(folder)}": path for path in saved}
    staged = output_dir / PUSH_FOLDER / str(step)
    shutil.rmtree(staged, ignore_errors=True)
    try:
        for name, path in files.items():
            (staged / name).parent.mkdir(parents=True, exist_ok=True)
            _link(path, staged / name)
    except OSError as error:
        raise HubError(
            f"The files of a push to the Hub could not be collected in {staged}: {first_line(error)}. The model is in "
            f"{folder}. Fix the cause, and call `trainer.push_to_hub()`, or train on: the next save pushes again."
        ) from error
    return staged


def _model_files(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """The files in a folder that belong to a saved model and its tokenizer, as paths relative to the folder."""
    patterns = [CONFIG_NAME, GENERATION_CONFIG_NAME, TRAINING_ARGS_NAME, "model*.safetensors*", "pytorch_model*.bin*"]
    for adapter in getattr(model, "peft_config", None) or {}:
        patterns.append("adapter_*" if adapter == "default" else f"{adapter}/adapter_*")
    if getattr(model.config, "auto_map", None):  # a model with its own code
        patterns.append("*.py")
    with TemporaryDirectory() as saved:
        tokenizer.save_pretrained(saved)
        names = {str(path.relative_to(saved)) for path in Path(saved).rglob("*") if path.is_file()}
    yield from names
    for pattern in patterns:
        yield from (str(path.relative_to(folder)) for path in folder.glob(pattern) if path.is_file())


def _link(source: Path, target: Path) -> None:
    if source.stat().st_size >= _LINKED_BYTES:
        try:
            os.link(source, target)
            return
        except OSError:  # a file system without hard links
            pass
    shutil.copy2(source, target)


# ---- The upload ----


@dataclass(frozen=True)
class Push:
    """An upload of a folder in one commit.

    Attributes:
        folder: result of [`stage`].
        repo_id: repository on the Hub.
        message: message of the commit.
        revision: branch; `None` for `main`.
        token: token with write access; `None` for that of the environment.
    """

    folder: Path
    repo_id: str
    message: str | None
    revision: str | None
    token: str | None = field(repr=False)

    def run(self) -> CommitInfo:
        """Upload the folder, and remove it.

        Raises:
            HubError: when the upload fails. The folder stays, and the message holds the command that repeats the push.
        """
        try:
            info: CommitInfo = _retried(hf_api().upload_folder)(
                repo_id=self.repo_id,
                folder_path=self.folder,
                commit_message=self.message,
                token=self.token,
                revision=self.revision,
            )
        except Exception as error:
            raise self.failed(error) from error
        shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):  # files of other pushes
            self.folder.parent.rmdir()
        return info

    def start(self) -> "Future[CommitInfo]":
        """Upload the folder in the background, after the pushes before it. A failure is logged as a warning."""
        return hf_api().run_as_future(self._run_and_warn)

    def _run_and_warn(self) -> CommitInfo:
        try:
            return self.run()
        except HubError as error:
            logger.warning(str(error))
            raise

    def failed(self, error: Exception) -> HubError:
        """The error to raise or to log for a failure of this push."""
        command = ["hf", "upload", self.repo_id, str(self.folder), "."]
        command += [] if self.revision is None else ["--revision", self.revision]
        login = f" {_advice(error)}" if _status(error) in (401, 403) else ""
        return HubError(
            f"The push to {self.repo_id} on the Hub failed: {_cause(error)}{login} Nothing is lost. Unless a later "
            f"push succeeds, repeat it with: {shlex.join(command)}"
        )


def clear_pushes(output_dir: Any) -> None:
    """Remove the folders of failed pushes, which the next push replaces."""
    shutil.rmtree(Path(output_dir, PUSH_FOLDER), ignore_errors=True)


class PushesToHub(DistillationTrainer):
    """The hooks of [`OmniOPDTrainer`] for the model card and for pushes to the Hub."""

    _tag_names: ClassVar[list[str]] = ["trl", "omniopd"]
    _name = "OmniOPD"
    _paper: ClassVar[dict[str, str]] = {
        "title": "OmniOPD: Logit-Free On-Policy Distillation via Speculative Verification",
        "id": "2606.01476",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{zhou2026omniopd,
                title        = {{OmniOPD: Logit-Free On-Policy Distillation via Speculative Verification}},
                author       = {Yuhang Zhou and Lizhu Zhang and Yifan Wu and Mingyi Wang and Peng Bo and Jiayi Liu and Xiangjun Fan and Zhuokai Zhao},
                year         = 2026,
                eprint       = {arXiv:2606.01476},
            }"""),  # noqa: E501
    }

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):
        if not self.is_world_process_zero():
            return
        model_name = model_name or Path(self.args.hub_model_id or Path(self.args.output_dir).absolute()).name
        super().create_model_card(model_name, dataset_name or dataset_id_of(self.train_dataset), tags)
        complete_card(self)

    def init_hf_repo(self, token=None, private=None):
        if self.is_world_process_zero():
            self.hub_model_id = open_repo(self.args, token, private)
            self.push_in_progress = None

    def save_model(self, output_dir=None, _internal_call=False):
        try:
            super().save_model(output_dir, _internal_call)
        except HubError as error:  # with `push_to_hub`, saving also pushes. The model is saved
            logger.warning(str(error))

    def push_to_hub(
        self,
        commit_message: str = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Save the student and its card, and push both. Every process has to call it.

        Pushed are the files of the model, of its tokenizer and of the card, and `training_args.bin`: nothing else that
        is in `output_dir`.

        Args:
            commit_message (`str`, *optional*, defaults to `"End of training"`): Message of the commit.
            blocking (`bool`, *optional*, defaults to `True`): Whether to wait for the end of the upload.
            token (`str`, *optional*): Token with write access. Defaults to `args.hub_token`, then to `HF_TOKEN`.
            revision (`str`, *optional*): Branch. Defaults to `args.hub_revision`.
            private (`bool`, *optional*): Whether a new repository is private. Defaults to `args.hub_private_repo`.
            kwargs: Arguments of `create_model_card`, such as `dataset_name`.

        Returns:
            [`~huggingface_hub.CommitInfo`], or a `Future` of it with `blocking=False`; `None` on other processes than
            the first.

        Raises:
            HubError: when the Hub cannot be reached or refuses the push. The message holds the command that repeats
                the push. Everything is on disk by then.
        """
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        if self.hub_model_id is None:
            self.init_hf_repo(token, private)
        self._push_trackers()
        self.create_model_card(**{"tags": getattr(self.model, "model_tags", None), **kwargs})
        self._finish_current_push()
        clear_pushes(self.args.output_dir)
        push = self._make_push(Path(self.args.output_dir), commit_message, token, revision)
        if blocking:
            return push.run()
        job = push.start()
        self.push_in_progress = PushInProgress([job])
        return job

    def _push_from_checkpoint(self, checkpoint_folder):
        """Push a checkpoint in the background. A failure is logged and does not stop the training."""
        strategy = self.args.hub_strategy
        if not self.is_world_process_zero() or strategy == HubStrategy.END:
            return
        jobs = [] if self.push_in_progress is None else [job for job in self.push_in_progress.jobs if not job.done()]
        if jobs and not self.args.hub_always_push:
            return
        self._push_trackers()
        if not jobs:
            clear_pushes(self.args.output_dir)
        folder = Path(checkpoint_folder)
        copies = {HubStrategy.CHECKPOINT: "last-checkpoint", HubStrategy.ALL_CHECKPOINTS: folder.name}
        message = f"Training in progress, step {self.state.global_step}"
        try:
            push = self._make_push(folder, message, checkpoint=copies.get(strategy))
        except HubError as error:
            logger.warning(str(error))
        else:
            self.push_in_progress = PushInProgress([*jobs, push.start()])

    def _push_trackers(self):
        try:
            self.callback_handler.on_push_begin(self.args, self.state, self.control)
        except Exception as error:  # of other packages, which reach for the network
            logger.warning(f"A callback failed at a push to the Hub, which continues without it: {first_line(error)}")

    def _make_push(self, folder, message, token=None, revision=None, checkpoint=None):
        step = self.state.global_step
        return Push(
            folder=stage(self.args, folder, self.model, self._tokenizer, step=step, checkpoint=checkpoint),
            repo_id=self.hub_model_id,
            message=message,
            revision=revision or self.args.hub_revision,
            token=token or self.args.hub_token,
        )
