# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Export a run as a dataset: Parquet files with a card, for `datasets.load_dataset` and for training."""

import json
import os
import shlex
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import DatasetCardData

import omniopd_trl
from omniopd_trl.errors import ConfigError, DataError, OmniOPDError, WarnOnce, first_line
from omniopd_trl.journal.browse import AuditedTrajectory, ShownChunk, read_audits, settings_of
from omniopd_trl.journal.reader import spent
from omniopd_trl.journal.schema import TOKENS
from omniopd_trl.report.runs import Run, without_folders
from omniopd_trl.teachers.base import clean_text, text_of_content

# The file with the settings and counts of the run, beside the data. A reader refuses another version of the format.
ABOUT_FILE = "export.json"
FORMAT = 1
DATA_FILES = "data/train-*.parquet"

# Settings that decide which trajectories, chunks and rollouts a run records. Another run can use them only with the
# same values.
DECISIVE = (
    *("num_chunks", "chunk_length", "min_chunk_length", "num_rollouts", "chunk_overlap", "chunk_placement"),
    *("chunk_selection", "keep_special_tokens", "mask_truncated_completions", "max_completion_length", "temperature"),
    *("top_p", "top_k", "min_p", "repetition_penalty", "teacher_temperature", "teacher_top_p", "signal"),
    *("teacher_context_column", "min_anchor_entropy", "first_rollouts"),
)

# Settings of the teacher that may change within a run: its rollouts are recorded, and no other run needs the same.
_OF_THE_TEACHER = (
    *("teacher_context_template", "teacher_continuation", "teacher_chat_template_kwargs", "teacher_extra_body"),
)

# Limits of what is in memory at once, and of one file.
_ROWS, _TOKENS = 256, 200_000
_FILE_SIZE = 256 * 2**20

_BATCH = "per_device_train_batch_size x gradient_accumulation_steps"
# Recorded settings that are exported: no path and no text of a user is among them.
_SETTINGS = (
    *("student", "student_parameters", "student_weights", *DECISIVE, "min_rollouts", "similarity", "prior"),
    *("prior_strength", "beta", "loss_normalization", "posterior_baseline", "importance_sampling_correction"),
    *("importance_sampling_clip_max", "learning_rate", "lr_scheduler_type", "optim", "max_grad_norm", "max_steps"),
    *("num_train_epochs", "seed", _BATCH, "cascade_low", "cascade_high"),
    *("num_generations", "reward_weight", "reward_weights", "audit_trajectories"),
    *("num_branches", "fork_candidates", "scale_advantages", "rollout_imitation", "rollout_imitation_tokens"),
)

_CHUNK = pa.struct(
    [
        pa.field("start", pa.int32()),
        pa.field("end", pa.int32()),
        pa.field("anchor", pa.int32()),
        pa.field("offset", pa.int32()),
        pa.field("text", pa.string()),
        pa.field("rollouts", pa.list_(pa.struct([("text", pa.string()), ("similarity", pa.float64())]))),
        pa.field("prior", pa.float64()),
        pa.field("posterior", pa.float64()),
        pa.field("weight", pa.float64()),
        pa.field("mark", pa.float64()),
        pa.field(
            "branches",
            pa.list_(pa.struct([("text", pa.string()), ("similarity", pa.float64()), ("advantage", pa.float64())])),
        ),
    ]
)
_FIELDS = (
    ("step", pa.int32(), "optimizer step, from 0"),
    ("process", pa.int32(), "process of the run"),
    ("index", pa.int32(), "number of the trajectory in the batch of its process"),
    ("teacher", pa.string(), "name of the teacher"),
    ("models", pa.list_(pa.string()), "models that answered, as the service reports them"),
    ("prompt", None, "prompt, as in the training set"),
    ("teacher_context", pa.string(), "what only the teacher saw beside the prompt, if anything"),
    ("prompt_ids", pa.list_(pa.int32()), "its tokens, rendered with the student's chat template"),
    ("completion", pa.string(), "what the student wrote"),
    ("completion_ids", pa.list_(pa.int32()), "its tokens"),
    ("sampling_seed", pa.int64(), "seed of the trajectory: of a random selection of chunks, and of the teacher"),
    ("entropies", pa.list_(pa.float32()), "entropy of each token (Eq. 6), in nats, rounded to 0.02"),
    ("logprobs", pa.list_(pa.float32()), "log-probability of each token under the student of the step, in nats"),
    ("sampling_logprobs", pa.list_(pa.float64()), "the same under the engine that sampled, if it was another one"),
    (
        "chunks",
        pa.list_(_CHUNK),
        "audited chunks: tokens `[start, end)` with the anchor; `offset`, the number of characters of `completion` "
        "before `text`; the rollouts with their similarity (Eq. 3); `prior` (Eq. 4), `posterior` (Eq. 5), and the "
        "weight in the loss; `mark`, that of a judge, if there is one; `branches`, what else the student wrote there, "
        "its own chunk first, if there are any",
    ),
    ("num_dropped_chunks", pa.int32(), "chunks with too few rollouts"),
    (
        "rewards",
        pa.list_(pa.struct([("name", pa.string()), ("score", pa.float64())])),
        "score of each reward function of the training, if there are any",
    ),
    ("advantage", pa.float64(), "reward minus the mean over the trajectories of the same prompt and step"),
    ("usage", pa.struct([(name, pa.int64()) for name in TOKENS]), "tokens of the teacher's requests"),
    ("usd", pa.float64(), "their cost in US dollars, if there is a price"),
)

_TERMS = (
    "The rollouts were written by the teacher. The terms of its provider may restrict their publication, and the use "
    "of models that are trained with them. Check them before you publish or use this dataset."
)

_warn_once = WarnOnce(__name__)


class PushError(OmniOPDError, RuntimeError):
    """An export could not be pushed to the Hub."""


def write_export(run: Run, folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Write the finished audits of all processes of a run, one row per trajectory, also while the run writes.

    The rows are read and written in pieces. The folder appears when it is complete, and replaces an earlier export.

    Args:
        run: the run.
        folder: folder of the dataset.

    Returns:
        What is known about the run, as in the file `export.json`.

    Raises:
        ConfigError: when the folder holds something else.
        DataError: when the run has no finished audit.
        JournalError: when a journal cannot be read.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / ABOUT_FILE).exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists and is not an export, so it is not replaced. Give another folder.")
    places = run.places
    if not places:
        raise DataError(f"{run.folder} holds no finished audit yet.")
    staged = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(staged, ignore_errors=True)
    (staged / "data").mkdir(parents=True)
    # Not those of the newest run in the folder: it may have recorded none of the rows.
    recorded = settings_of(run.folder, places)
    settings = recorded[-1] if recorded else {}
    about = _write_rows(run, read_audits(run.folder, places), staged, bool(settings.get("keep_special_tokens")))
    usage, usd = spent(run.folder)
    about |= {
        "format": FORMAT,
        "omniopd_trl": omniopd_trl.__version__,
        "run": run.name,
        "steps": [places[0].step, places[-1].step],
        "num_processes": len({place.rank for place in places}),
        "usage": asdict(usage),
        "usd": usd,
        "settings": {name: settings[name] for name in _SETTINGS if name in settings},
        # Names of settings that some rows were recorded with other values of.
        "mixed": [
            name
            for name in (*DECISIVE, *_OF_THE_TEACHER)
            if any(one.get(name) != settings.get(name) for one in recorded)
        ],
    }
    if student := about["settings"].get("student"):
        about["settings"]["student"] = without_folders(student)
    (staged / ABOUT_FILE).write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n", "utf-8")
    (staged / "README.md").write_text(card(about), "utf-8")
    if folder.exists():
        shutil.rmtree(folder)
    staged.rename(folder)
    return about


def _write_rows(run: Run, trajectories: Iterable[AuditedTrajectory], folder: Path, keep: bool) -> dict[str, Any]:
    """Write the data files, and count what is in them. `keep` tells whether texts keep special tokens."""
    counts = Counter[str]()
    teachers, models = dict[str, None](), set[str]()
    schema = None
    names = (folder / DATA_FILES.replace("*", f"{number:05d}") for number in count())
    with ExitStack() as stack:
        file: Any = None
        writer = None
        for rows in _pieces(_row(one, run.text(one.completion_ids, keep)) for one in trajectories):
            if schema is None:
                schema = _schema(is_text=isinstance(rows[0]["prompt"], str))
            if writer is None or file.tell() > _FILE_SIZE:
                stack.close()
                file = stack.enter_context(next(names).open("wb"))
                writer = stack.enter_context(pq.ParquetWriter(file, schema, compression="zstd"))
            writer.write_table(pa.Table.from_pylist(rows, schema), row_group_size=len(rows))
            for row in rows:
                teachers[row["teacher"]] = None
                models.update(row["models"])
                counts["num_trajectories"] += 1
                counts["num_chunks"] += len(row["chunks"])
                counts["num_rollouts"] += sum(len(chunk["rollouts"]) for chunk in row["chunks"])
    return {**counts, "teachers": list(teachers), "models": sorted(models)}


def _schema(is_text: bool) -> pa.Schema:
    prompt = pa.string() if is_text else pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    return pa.schema([(name, prompt if kind is None else kind) for name, kind, _ in _FIELDS])


def _pieces(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    piece: list[dict[str, Any]] = []
    tokens = 0
    for row in rows:
        piece.append(row)
        tokens += len(row["completion_ids"])
        if len(piece) == _ROWS or tokens >= _TOKENS:
            yield piece
            piece, tokens = [], 0
    if piece:
        yield piece


def _row(trajectory: AuditedTrajectory, completion: str | None) -> dict[str, Any]:
    verified = trajectory.verified or {}
    scores = verified.get("rewards")
    return {
        "step": trajectory.step,
        "process": trajectory.rank,
        "index": trajectory.index,
        "teacher": without_folders(trajectory.teacher),
        "models": trajectory.models,
        "prompt": _prompt(trajectory.prompt),
        "teacher_context": None if trajectory.teacher_context is None else clean_text(trajectory.teacher_context),
        "prompt_ids": trajectory.prompt_ids,
        "completion": completion,
        "completion_ids": trajectory.completion_ids,
        "sampling_seed": trajectory.seed,
        "entropies": trajectory.entropies,
        "logprobs": trajectory.logprobs or None,
        "sampling_logprobs": trajectory.sampling_logprobs,
        "chunks": [_chunk(chunk, completion) for chunk in trajectory.chunks],
        "num_dropped_chunks": trajectory.num_dropped,
        "rewards": scores and [{"name": name, "score": score} for name, score in scores.items()],
        "advantage": verified.get("advantage"),
        "usage": asdict(trajectory.usage),
        "usd": trajectory.usd,
    }


def _chunk(chunk: ShownChunk, completion: str | None) -> dict[str, Any]:
    pairs = zip(chunk.rollouts, chunk.similarities, strict=bool(chunk.rollouts))  # a mark has no rollout
    return {
        "start": chunk.start,
        "end": chunk.end,
        "anchor": chunk.anchor,
        "offset": len(chunk.prefix) if (completion or "").startswith(chunk.prefix) else None,
        "text": clean_text(chunk.text),
        "rollouts": [{"text": clean_text(text), "similarity": similarity} for text, similarity in pairs],
        "prior": chunk.prior,
        "posterior": chunk.posterior,
        "weight": chunk.weight,
        "mark": chunk.mark,
        "branches": [
            {"text": clean_text(branch.text), "similarity": branch.similarity, "advantage": branch.advantage}
            for branch in chunk.branches
        ],
    }


def _prompt(prompt: Any) -> Any:
    if isinstance(prompt, str):
        return clean_text(prompt)
    others = {key for message in prompt for key, value in message.items() if value is not None} - {"role", "content"}
    if others:
        _warn_once(
            f"Messages of the prompts hold {', '.join(sorted(others))}, which the column `prompt` leaves out. "
            "`prompt_ids` holds all that the student read."
        )
    return [
        {
            "role": message.get("role"),
            "content": None if message.get("content") is None else clean_text(text_of_content(message["content"])),
        }
        for message in prompt
    ]


def decisive_changes(about: dict[str, Any]) -> list[str]:
    """Settings that differ between the rows of an export, and that a training from it would have to share."""
    return [name for name in about["mixed"] if name in DECISIVE]


def obstacle(about: dict[str, Any]) -> str | None:
    """What an export holds that no run can train from; `None` if one can. A training needs all rollouts."""
    if about["settings"].get("signal", "rollouts") != "rollouts":
        return "marks of a judge"
    changes = decisive_changes(about)
    return f"steps with different {', '.join(changes)}" if changes else None


def training_options(about: dict[str, Any], name: str) -> str:
    """The options that train from an export, in addition to the recipe of the run.

    Args:
        about: what is known about the run.
        name: folder of the export, or id of its repository.
    """
    off = {"num_branches": 0, "fork_candidates": 0, "scale_advantages": "false"}
    without = (f" --{option} {value}" for option, value in off.items() if about["settings"].get(option))
    return f"--teacher_model_name_or_path export:{shlex.quote(name)}{''.join(without)}"


def card(about: dict[str, Any], repo_id: str | None = None) -> str:
    """The card of an export, as Markdown with a header in YAML.

    Args:
        about: what is known about the run.
        repo_id: id of the dataset on the Hub; `None` for a local folder.
    """
    number = about["num_trajectories"]
    bounds = [(1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M")]
    # No `configs`: with it, `datasets` 5 caches a local folder by the name of the folder and this header alone, and
    # would return the rows of another export of the same name.
    header = DatasetCardData(
        pretty_name=f"OmniOPD audits of {about['run']}",
        tags=["omniopd", "on-policy-distillation", "trl"],
        task_categories=["text-generation"],
        size_categories=[next((name for bound, name in bounds if number < bound), "1M<n<10M")],
    )
    settings, usage = about["settings"], about["usage"]
    student = settings.get("student") or "a local model"
    if settings.get("student_parameters"):
        student += f", {settings['student_parameters']:,} parameters"
    rows = {
        "student": student,
        "teacher": ", ".join(about["teachers"]),
        "served as": ", ".join(about["models"]),
        "steps": f"{about['steps'][0]:,} to {about['steps'][1]:,}, {about['num_processes']} process(es)",
        "trajectories, chunks, rollouts": f"{number:,}, {about['num_chunks']:,}, {about['num_rollouts']:,}",
        "teacher tokens": f"{usage['prompt_tokens']:,} read, {usage['completion_tokens']:,} written",
        "cost": f"{about['usd']:,.4f} US dollars" if about["usd"] else "",
        "changed between steps": ", ".join(f"`{name}`" for name in about["mixed"]),
        "omniopd_trl": about["omniopd_trl"],
    }
    name = repo_id or "FOLDER"
    branches = (
        f"\nThe run trained {settings['num_branches']} branches of the student beside each chunk. They are those of\n"
        "its student, so this dataset can train the recorded chunks in the paper's form only.\n"
        if settings.get("num_branches")
        else ""
    )
    training = (
        f"No run can train from this dataset, since it holds {held}."
        if (held := obstacle(about)) is not None
        else f"""\
The recipe of the run, with this dataset in place of the teacher, asks no teacher and costs nothing:

```bash
omniopd train --config RECIPE.yaml {training_options(about, name)}
```
{branches}
The rollouts are scored again, so `similarity`, `prior_strength`, `posterior_baseline`, `beta` and the learning rate
may differ. The trajectories are those of the student of the run. With another student or other settings, training is
off-policy: the metric `off_policy/kl` says how far, and truncated importance weights correct the chunk loss."""
    )
    return f"""---
{header.to_yaml()}
---

# OmniOPD audits of {about["run"]}

Trajectories of a student, and what a teacher wrote in place of their most uncertain chunks, recorded during on-policy
distillation with [OmniOPD](https://huggingface.co/papers/2606.01476). One row is one trajectory.

{_table(rows)}

```python
from datasets import load_dataset

audits = load_dataset("{name}", split="train")
```

## Train from it

{training}

## Columns

{_table({f"`{name}`": text for name, _, text in _FIELDS})}

## Settings of the run

{_table({f"`{name}`": f"`{value}`" for name, value in settings.items()})}

## Terms

{_TERMS}
"""


def _table(rows: dict[str, str]) -> str:
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items() if value)])


def push_export(folder: str | os.PathLike[str], repo_id: str, *, private: bool = False) -> str:
    """Push an export to a dataset repository of the Hub, which is created if needed.

    Args:
        folder: result of [`write_export`].
        repo_id: id of the repository, or its name in the namespace of the user.
        private: whether a new repository is private.

    Returns:
        The address of the repository.

    Raises:
        PushError: when it fails. The folder stays, and the message says how to retry.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, HTTPError

    api, folder = HfApi(), Path(folder)
    try:
        repo = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
        about = json.loads((folder / ABOUT_FILE).read_text("utf-8"))
        (folder / "README.md").write_text(card(about, repo.repo_id), "utf-8")
        api.upload_folder(
            repo_id=repo.repo_id,
            folder_path=folder,
            repo_type="dataset",
            commit_message=f"Upload the audits of {about['run']}",
        )
    except (HTTPError, HFValidationError, OSError) as error:
        raise PushError(
            f"The export is in {folder}, and could not be pushed to {repo_id!r}: {first_line(error)} Retry with: hf "
            f"upload {repo_id} {folder} . --repo-type dataset{' --private' if private else ''}"
        ) from error
    return str(repo)
