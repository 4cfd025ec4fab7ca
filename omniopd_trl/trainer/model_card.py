# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The model card: TRL's, with what a reader of a distilled model needs to know."""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from huggingface_hub import EvalResult, ModelCard
from huggingface_hub.errors import HfHubHTTPError
from trl.trainer.utils import get_config_model_id
from yaml import YAMLError

import omniopd_trl
from omniopd_trl.errors import MissingExtraError
from omniopd_trl.journal.reader import spent
from omniopd_trl.method.similarity import name_or_function
from omniopd_trl.report.figures import FIGURES, Figure
from omniopd_trl.report.runs import series, without_folders

CARD = "README.md"
FIGURE = "chunk_loss.png"

TERMS = (
    "The license of the teacher, or the terms of its provider, may restrict the use of models that were trained with "
    "its outputs. Check them before you publish or use this model."
)


def base_model_of(name: str | None) -> str | None:
    """The model on the Hub that a student is derived from; `None` when it cannot be told.

    A local folder is looked into: its model card, its adapter's configuration, then the model's configuration.

    Args:
        name: path or id of the student.
    """
    seen: set[str] = set()
    while name and os.path.isdir(name) and name not in seen:
        seen.add(name)
        name = _base_of_folder(Path(name))
    # An id has at most one slash, and begins with neither a dot nor a slash.
    if name and not os.path.isdir(name) and re.fullmatch(r"[\w][\w.-]*(/[\w][\w.-]*)?", name):
        return name
    return None


def _base_of_folder(folder: Path) -> str | None:
    try:
        base = ModelCard.load(folder / CARD, ignore_metadata_errors=True).data.get("base_model")
    except (OSError, ValueError, HfHubHTTPError, YAMLError):
        base = None
    if isinstance(base, list):
        base = base[0] if base else None
    for file, key in (("adapter_config.json", "base_model_name_or_path"), ("config.json", "_name_or_path")):
        if not base and (folder / file).exists():
            base = json.loads((folder / file).read_text("utf-8")).get(key)
    return base if isinstance(base, str) else None


def dataset_id_of(dataset: Any) -> str | None:
    """The dataset on the Hub that a map-style dataset was loaded from; `None` when it cannot be told."""
    if not isinstance(dataset, Dataset):
        return None
    sources = (re.match(r"hf://datasets/([^@]+)@", source) for source in dataset.info.download_checksums or ())
    return next((source[1] for source in sources if source), None)


def complete_card(trainer: Any) -> None:
    """Correct the metadata of the card that TRL wrote, and add the section on the training and the package's version.

    Args:
        trainer: the trainer, with the card in its `output_dir`.
    """
    output_dir, logs = Path(trainer.args.output_dir), trainer.state.log_history
    student = get_config_model_id(trainer.model.config)
    base_model = base_model_of(student)
    peft_config = getattr(trainer.model, "active_peft_config", None)
    # A figure takes longer than the rest, and a card that is on disk only is written again at the end.
    draws = trainer.args.push_to_hub or not trainer.is_in_train
    parts = [
        "### Distillation",
        "The student wrote its own solutions. At its most uncertain places, the teacher wrote what it would have said "
        "next, as text, and their similarity was the training signal.",
        "\n".join(
            ["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in _rows(trainer, base_model))]
        ),
    ]
    if draws and (description := draw_figure(output_dir, logs)):
        parts.append(f"![{description}]({FIGURE})")
    if peft_config is not None and base_model != student:
        parts.append(
            "This adapter belongs to the local model. It does not fit the model that the local one is derived from."
        )
    section = "\n\n".join([*parts, TERMS])

    card = ModelCard.load(output_dir / CARD)
    data = card.data
    data.pop("licence")  # a placeholder of TRL
    data.pipeline_tag = "text-generation"
    data.base_model = base_model
    if base_model is not None:
        data.base_model_relation = "finetune" if peft_config is None else "adapter"
    if peft_config is not None:
        kind = str(getattr(peft_config.peft_type, "value", peft_config.peft_type)).lower()
        data.library_name = "peft"
        data.tags = [*(data.tags or []), kind, "transformers"]
        data.tags += [] if base_model is None else [f"base_model:adapter:{base_model}"]
    if result := evaluation_result(trainer.eval_dataset, logs):
        data.eval_results = [result]
    named = "model" if base_model is None else f"version of [{base_model}](https://huggingface.co/{base_model})"
    card.text = re.sub(r"(a fine-tuned )version of \[[^\]]*\]\([^)]*\)", rf"\g<1>{named}", card.text, count=1)
    card.text = card.text.replace('model="None"', f'model="{output_dir.resolve().name}"')  # not pushed
    versions = "### Framework versions\n\n"
    card.text = card.text.replace(versions, f"{section}\n\n{versions}- omniopd_trl: {omniopd_trl.__version__}\n")
    card.save(output_dir / CARD)


def _rows(trainer: Any, base_model: str | None) -> Iterator[tuple[str, str]]:
    """The table of the training, as names and values."""
    args, teacher, logs = trainer.args, trainer.teacher, trainer.state.log_history
    student = get_config_model_id(trainer.model.config)
    if base_model and base_model == student:  # an id on the Hub
        yield "student", f"`{student}`"
    else:
        yield "student", "a local model" + (f", derived from `{base_model}`" if base_model else "")
    served = getattr(teacher, "served_model", None)
    yield "teacher", f"`{without_folders(teacher.name)}`" + (f", served as `{served}`" if served else "")
    if isinstance(trainer.train_dataset, Dataset):
        yield "training prompts", f"{len(trainer.train_dataset):,}"
    sizes = f"M = {args.num_chunks} of at most C = {args.chunk_length} tokens, {answers_per_chunk(args)}"
    if args.num_branches:
        sizes += f", compared with K = {args.num_branches} branches besides"
    yield "chunks", sizes
    if args.rollout_imitation:
        yield "imitation of rollouts", f"{args.rollout_imitation:g}, {args.rollout_imitation_tokens} tokens of each"
    yield "prior strength alpha, anchor beta", f"{args.prior_strength:g}, {args.beta:g}"
    yield "similarity phi", f"`{_name(name_or_function(trainer.auditor.similarity))}`"
    yield "baseline of the posterior", f"`{_name(trainer.step_audits.custom_weights or args.posterior_baseline)}`"
    if args.uses_rewards:
        size = f"G = {args.num_generations} trajectories per prompt, reward weight {args.reward_weight:g}"
        yield "verifier", f"{size}, audited: {args.audit_trajectories}"
    yield "optimizer steps, learning rate", f"{trainer.state.global_step:,}, {args.learning_rate:g}"
    if scores := series(logs, "eval_pass@1"):
        ends = scores if len(scores) == 1 else (scores[0], scores[-1])
        yield "pass@1", " → ".join(f"{score:.3f} (step {step:g})" for step, score in ends)
    # Of all runs in the folder, as `teacher/usd_total`. Without `save_audits`, those of this process are known.
    usages = (trainer.teacher_usage, spent(args.output_dir)[0])
    usage = max(usages, key=lambda usage: usage.prompt_tokens + usage.completion_tokens)
    yield "teacher tokens", f"{usage.prompt_tokens:,} read, {usage.completion_tokens:,} written"
    if dollars := series(logs, "teacher/usd_total"):
        yield "cost", f"{dollars[-1][1]:,.2f} US dollars"


def answers_per_chunk(args: Any) -> str:
    """What the teacher answers for each chunk, in words."""
    rollouts = f"N = {args.num_rollouts} rollouts each"
    if args.first_rollouts:
        rollouts += f" ({args.first_rollouts} where these are equal)"
    if args.signal == "judge":
        return "1 mark of the teacher each"
    if args.signal == "cascade":
        return f"1 mark each, and {rollouts} between {args.cascade_low:g} and {args.cascade_high:g}"
    return rollouts


def _name(value: str | Callable[..., Any]) -> str:
    return value if isinstance(value, str) else getattr(value, "__name__", type(value).__name__)


def draw_figure(folder: Path, log_history: Sequence[Mapping[str, Any]]) -> str | None:
    """Draw the chunk loss as [`FIGURE`], and return its description.

    `None` without two points, or without matplotlib.
    """
    name, title, unit, _ = FIGURES[0]
    points = series(log_history, name)
    if len(points) < 2:
        return None
    steps, values = zip(*points, strict=True)
    figure = Figure(name, title, unit, ((title.lower(), 0, steps, values),))
    try:
        (folder / FIGURE).write_bytes(figure.png())
    except MissingExtraError:
        return None
    return figure.description


def evaluation_result(dataset: Any, log_history: Sequence[Mapping[str, Any]]) -> EvalResult | None:
    """The last pass@1 as the Hub shows it; `None` when it, or the dataset's id on the Hub, is not known."""
    scores, name = series(log_history, "eval_pass@1"), dataset_id_of(dataset)
    if not scores or name is None:
        return None
    return EvalResult(
        task_type="text-generation",
        dataset_type=name,
        dataset_name=name,
        dataset_split=None if dataset.split is None else str(dataset.split),
        metric_type="pass@1",
        metric_value=round(scores[-1][1], 4),
    )
