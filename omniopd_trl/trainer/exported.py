# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""An exported run: its trajectories and rollouts as a dataset, from which another run trains without a teacher."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from omniopd_trl.audits.auditor import Answered, Auditor
from omniopd_trl.audits.types import Audit, PolicyScores, Trajectory, Verified
from omniopd_trl.data.encoding import encode_prompts
from omniopd_trl.errors import ConfigError, DataError, TeacherError, first_line
from omniopd_trl.journal.store import Journal
from omniopd_trl.method.chunks import Chunk
from omniopd_trl.report.export import ABOUT_FILE, DATA_FILES, DECISIVE, FORMAT, decisive_changes
from omniopd_trl.teachers import Teacher, TeacherOptions
from omniopd_trl.teachers.base import Prefix, Rollout, SamplingRequest, TeacherReply
from omniopd_trl.teachers.load import EXPORT_PREFIX
from omniopd_trl.teachers.options import check_options
from omniopd_trl.trainer.fingerprint import SINCE_EARLIER_RECORDS
from omniopd_trl.trainer.omniopd_config import OmniOPDConfig

logger = logging.get_logger(__name__)

_PLACE = ["step", "process", "index"]


@dataclass(frozen=True)
class ExportedTrajectory:
    """One row of an export, as training needs it.

    Attributes:
        trajectory: the trajectory. Its `sampling_logprobs` are those of the engine or of the policy that sampled it;
            empty when the run recorded none.
        is_of_engine: whether they are those of an engine, with its sampling filters.
        chunks: the audited chunks.
        texts: the student's text in each of them.
        replies: the rollouts of each of them, cut to its length.
        num_dropped: chunks that had too few rollouts.
    """

    trajectory: Trajectory
    is_of_engine: bool
    chunks: list[Chunk]
    texts: list[str]
    replies: list[TeacherReply]
    num_dropped: int


class Export(Teacher):
    """The export of a run, in place of a teacher. It answers the audits of its own trajectories, and nothing else.

    Args:
        source: folder that `omniopd export` wrote, or id of such a dataset on the Hub.

    Raises:
        DataError: when there is no such export, or it cannot be read.

    Attributes:
        about: what is known about the run: its settings, counts, teachers and cost.
        served_model: the models that answered, as the service reported them; `None` when it reported none.
    """

    def __init__(self, source: str):
        self.source = source
        folder = _folder_of(source)
        try:
            self.about: dict[str, Any] = json.loads((folder / ABOUT_FILE).read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(
                f"The export {source!r} cannot be read: {first_line(error)}. Give the folder that `omniopd export "
                "RUN_DIR` wrote, or the id of such a dataset on the Hub."
            ) from error
        if self.about.get("format") != FORMAT:
            raise DataError(
                f"The export {source!r} has the format {self.about.get('format')!r}, and this version of omniopd_trl "
                f"reads {FORMAT}. Use omniopd_trl {self.about.get('omniopd_trl')}, or export the run again."
            )
        self.name = f"{', '.join(self.about['teachers'])} (export, off-policy)"
        self.served_model = ", ".join(self.about["models"]) or None
        try:
            self._files = [pq.ParquetFile(path) for path in sorted(folder.glob(DATA_FILES))]
            # The first row of each row group, over all files, and the step of each row.
            self._groups = [(file, group) for file in self._files for group in range(file.num_row_groups)]
            sizes = [file.metadata.row_group(group).num_rows for file, group in self._groups]
            self._firsts = np.cumsum([0, *sizes])
            places = np.concatenate(
                [np.empty((0, 3)), *(np.column_stack(file.read(_PLACE).columns) for file in self._files)]
            )
        except (pa.ArrowException, OSError, ValueError) as error:
            raise DataError(
                f"The export {source!r} cannot be read: {first_line(error)}. Export the run again."
            ) from error
        self._steps = places[:, 0]
        # Sorted and without duplicates.
        if not np.array_equal(places, np.unique(places, axis=0)):
            raise DataError(
                f"The rows of the export {source!r} are not in the order of step, process and index, or some are "
                "there twice. Sort them, or export the run again."
            )

    def num_steps(self, size: int) -> int:
        """The number of steps 0, 1, ... in a row that hold exactly `size` trajectories."""
        steps, counts = np.unique(self._steps, return_counts=True)
        whole = (steps == np.arange(len(steps))) & (counts == size)
        return int(np.argmin(whole)) if not whole.all() else len(whole)

    def first_size(self) -> int:
        """The number of trajectories of step 0."""
        return int((self._steps == 0).sum())

    def prompts(self, count: int, context: str | None = None) -> pa.Table:
        """The prompts of the first `count` trajectories, in the order of the steps.

        Args:
            count: number of trajectories.
            context: name of a second column, of what only the teacher saw; `None` leaves it out.
        """
        columns = {"prompt": "prompt"} | ({} if context is None else {"teacher_context": context})
        table = pa.concat_tables([file.read([*columns]) for file in self._files]).slice(0, count)
        return table.rename_columns([columns[name] for name in table.column_names])

    def trajectories(self, step: int, first: int, count: int) -> list[ExportedTrajectory]:
        """Trajectories of a step, by process and index.

        Args:
            step: optimizer step.
            first: index of the first trajectory within the step, over all processes of the recorded run.
            count: number of trajectories.

        Raises:
            DataError: when the step does not hold them.
        """
        start, end = np.searchsorted(self._steps, [step, step + 1])
        if first + count > end - start:
            raise DataError(
                f"Step {step} of the export {self.source!r} has {end - start} trajectories, and this run takes the "
                f"ones up to {first + count}. Train with the batch size of the run that was exported."
            )
        start = int(start) + first
        groups = range(
            int(np.searchsorted(self._firsts, start, "right")) - 1, int(np.searchsorted(self._firsts, start + count))
        )
        table = pa.concat_tables([self._groups[group][0].read_row_group(self._groups[group][1]) for group in groups])
        return [_exported(row) for row in table.slice(start - int(self._firsts[groups[0]]), count).to_pylist()]

    async def sample(self, prefixes: Sequence[Prefix], request: SamplingRequest) -> list[TeacherReply]:
        raise TeacherError(
            f"The export {self.source!r} was asked to continue a text, and it holds only the rollouts of its own "
            "trajectories. Set `teacher_model_name_or_path` to a teacher."
        )


def _folder_of(source: str) -> Path:
    folder = Path(source).expanduser()
    if folder.is_dir() or not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(source, repo_type="dataset", allow_patterns=[ABOUT_FILE, DATA_FILES]))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise DataError(
            f"There is no folder {source!r} (looked in {Path.cwd()}), and no such dataset can be loaded from the Hub: "
            f"{first_line(error)}. Check the name of the export, and the access to it."
        ) from error


def _exported(row: dict[str, Any]) -> ExportedTrajectory:
    chunks = row["chunks"]
    return ExportedTrajectory(
        Trajectory(
            row["prompt"],
            row["prompt_ids"],
            row["completion_ids"],
            seed=row["sampling_seed"],
            sampling_logprobs=row["sampling_logprobs"] or row["logprobs"] or [],
            verified=_verified(row),
        ),
        row["sampling_logprobs"] is not None,
        [Chunk(chunk["start"], chunk["end"], chunk["anchor"]) for chunk in chunks],
        [chunk["text"] for chunk in chunks],
        [
            TeacherReply(tuple(Rollout(rollout["text"]) for rollout in chunk["rollouts"]), models=tuple(row["models"]))
            for chunk in chunks
        ],
        row["num_dropped_chunks"],
    )


def _verified(row: dict[str, Any]) -> Verified | None:
    """The recorded scores. What follows from them is computed again, with this run's settings."""
    scores = row.get("rewards")  # not in every earlier export
    return None if scores is None else Verified({one["name"]: one["score"] for one in scores}, None, 0.0)


def open_export(name: str, args: OmniOPDConfig) -> tuple[Export, Dataset]:
    """Open the export that a run trains from, and check that its settings fit, before anything else is loaded.

    Args:
        name: name of the export, with its prefix.
        args: configuration of the run.

    Returns:
        The export, and its prompts in the order of its steps, as the training set.

    Raises:
        ConfigError: when the run's settings need rollouts that the export does not hold.
        DataError: when there is no such export, or it cannot be read.
    """
    export = Export(name.removeprefix(EXPORT_PREFIX))
    if changes := decisive_changes(export.about):
        raise ConfigError(
            f"Steps of the export {export.source!r} were recorded with different {', '.join(changes)}, "
            "so no run has the settings of all. Export a run that kept its settings."
        )
    # The defaults of these are not recorded.
    defaults = {name: OmniOPDConfig.__dataclass_fields__[name].default for name in SINCE_EARLIER_RECORDS}
    recorded: dict[str, Any] = {**defaults, **export.about["settings"]}
    different = [
        f"{option} is {getattr(args, option)!r} and was {recorded[option]!r}"
        for option in DECISIVE
        if option in recorded and getattr(args, option) != recorded[option]
    ]
    if args.min_rollouts < recorded.get("min_rollouts", args.min_rollouts):
        different.append(f"min_rollouts is {args.min_rollouts} and was {recorded['min_rollouts']}, and can only rise")
    if different:
        raise ConfigError(
            f"The export {export.source!r} holds no rollouts for these settings: {', '.join(different)}. Restore "
            "them, or train with a teacher."
        )
    if args.num_branches:
        raise ConfigError(
            f"num_branches={args.num_branches}: branches are drawn from the student that is trained, and those of an "
            "export are another student's. Set num_branches=0 to train its chunks in the paper's form, or train with "
            "a teacher."
        )
    generations = recorded["num_generations"]
    if args.num_generations != generations:
        raise ConfigError(
            f"num_generations={args.num_generations}: each prompt of the export {export.source!r} has "
            f"{generations} trajectories in a step. Set num_generations={generations}."
        )
    if args.signal != "rollouts":
        raise ConfigError(
            f"signal={args.signal!r} needs a teacher to ask, and the run trains from an export. Leave it out."
        )
    if args.audit_eval:
        raise ConfigError("audit_eval=True needs a teacher to ask, and the run trains from an export. Leave it out.")
    size = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    there = export.num_steps(size)
    needed = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * there)
    if there == 0 or needed > there:
        asked = f"max_steps={args.max_steps}" if args.max_steps > 0 else f"num_train_epochs={args.num_train_epochs:g}"
        raise ConfigError(
            f"{asked} with {size} trajectories per step (per_device_train_batch_size x gradient_accumulation_steps x "
            f"processes): the export {export.source!r} holds {there} such steps, and its first step has "
            f"{export.first_size()} trajectories. Set max_steps to at most the number of its steps, and the batch "
            "size to theirs."
        )
    check_options("export", export.name, TeacherOptions.of(args))
    if args.process_index == 0:
        logger.warning(
            f"Training from the export {export.source!r} of a run with {', '.join(export.about['teachers'])}: no "
            "teacher is asked, the prompts are those of the export in its order, and training is off-policy: "
            "`off_policy/kl` in the log tells how far."
        )
    return export, Dataset(export.prompts(there * size, args.teacher_context_column))


def check_prompt_ids(
    export: Export, step: int, exported: Sequence[ExportedTrajectory], prompt_ids: Sequence[Sequence[int]]
) -> None:
    """Check that the student reads the prompts of an export as the recorded student did.

    Raises:
        DataError: when its tokenizer or chat template gives other tokens.
    """
    if [list(one.trajectory.prompt_ids) for one in exported] != [list(ids) for ids in prompt_ids]:
        raise DataError(
            f"The prompts of step {step} of the export {export.source!r} have other tokens with the student's "
            "tokenizer and chat template than recorded. Train a student with those of the run that was exported."
        )


def check_first_step(export: Export, tokenizer: PreTrainedTokenizerBase, args: OmniOPDConfig) -> None:
    """Check the first step of an export, before a model is loaded.

    Raises:
        ConfigError: when importance weights would need probabilities, or a verifier rewards, that the export does not
            hold.
        DataError: as [`check_prompt_ids`].
    """
    first = export.trajectories(0, 0, export.first_size())
    if args.corrected_filters is not None and not all(one.is_of_engine for one in first):
        raise ConfigError(
            f"{', '.join(args.sampling_filters)}: the export {export.source!r} holds the log-probabilities of the "
            "student without this filter, which importance weights would need with it. Set "
            "importance_sampling_correction=False, or export a run that sampled with vLLM."
        )
    for one in first if args.uses_rewards else ():
        if one.trajectory.verified is None:
            raise ConfigError(
                f"reward_weight={args.reward_weight:g} and audit_trajectories={args.audit_trajectories!r}: the export "
                f"{export.source!r} holds no rewards. Leave both out, or export a run that recorded rewards."
            )
        args.reward_weights_of(list(one.trajectory.verified.rewards))
    prompts = [one.trajectory.prompt for one in first]
    check_prompt_ids(export, 0, first, encode_prompts(prompts, tokenizer, args.chat_template_kwargs))


async def rescore(
    auditor: Auditor,
    exported: ExportedTrajectory,
    trajectory: Trajectory,
    scores: PolicyScores,
    journal: Journal | None,
    step: int,
    index: int,
) -> Audit:
    """Audit a trajectory with the rollouts of an export: similarities, priors and posteriors are computed again.

    Args:
        auditor: auditor of this run, whose teacher is not asked.
        exported: the row of the export.
        trajectory: the trajectory of this run, with the same completion of `T` tokens.
        scores: scores of its tokens under the current student, `(T,)`.
        journal: journal in which the audit is recorded; `None` for none.
        step: current optimizer step.
        index: index of the trajectory in the generation batch of this process.

    Raises:
        DataError: when this run's tokenizer gives the chunks another text.
    """
    texts: list[tuple[str, str]] = []
    if not trajectory.is_chosen:
        exported = replace(exported, chunks=[], texts=[], replies=[], num_dropped=0)
    if exported.chunks:
        texts = auditor.alignment.split_texts(trajectory.completion_ids, exported.chunks, trajectory.prompt_ids)
    for (_, text), recorded in zip(texts, exported.texts, strict=True):
        if text != recorded:
            raise DataError(
                f"A chunk of step {step} of the export reads {recorded!r:.100}, and {text!r:.100} with the student's "
                "tokenizer. Train a student with the tokenizer of the run that was exported."
            )
    answered = Answered(trajectory, scores, exported.chunks, texts, exported.replies, is_cut=True)
    audit = await auditor.score_later(answered)
    audit = replace(audit, num_dropped=audit.num_dropped + exported.num_dropped)
    if journal is not None:
        journal.record(step, index, audit)
    return audit
