# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The model card: TRL's, with what a reader of a distilled model needs to know."""

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from datasets import Dataset
from huggingface_hub import EvalResult, ModelCard
from huggingface_hub.errors import HfHubHTTPError
from yaml import YAMLError

from omniopd_trl.accounting.usage import Usage
from omniopd_trl.errors import MissingExtraError
from omniopd_trl.report.figures import FIGURES, Figure
from omniopd_trl.report.runs import series
from omniopd_trl.teachers import Teacher
from omniopd_trl.trainer.omniopd_config import OmniOPDConfig

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


def training_section(
    args: OmniOPDConfig,
    *,
    student: str | None,
    base_model: str | None,
    is_adapter: bool,
    teacher: Teacher,
    num_prompts: int | None,
    similarity: str | Callable[..., Any],
    weights: str | Callable[..., Any],
    usage: Usage,
    log_history: Sequence[Mapping[str, Any]],
    num_steps: int,
    figure: str | None = None,
) -> str:
    """The card's section on the training, as Markdown.

    Args:
        args: configuration of the run.
        student: path or id of the student.
        base_model: result of [`base_model_of`].
        is_adapter: whether the model is an adapter of the student.
        teacher: the teacher.
        num_prompts: number of training prompts; `None` for a stream.
        similarity: name of the similarity phi, or a custom function.
        weights: name of the baseline of the posterior, or a custom function that replaces it.
        usage: tokens of all requests.
        log_history: the logged metrics, whose `eval_pass@1` and `teacher/usd_total` are reported.
        num_steps: number of optimizer steps.
        figure: description of the figure [`FIGURE`]; `None` without one.
    """
    is_local = bool(student) and os.path.isdir(str(student))
    name = "a local model" if is_local or not student else f"`{student}`"
    rows = [("student", name + (f", derived from `{base_model}`" if is_local and base_model else ""))]
    served = getattr(teacher, "served_model", None)
    rows.append(("teacher", f"`{_basename(teacher.name)}`" + (f", served as `{served}`" if served else "")))
    if num_prompts is not None:
        rows.append(("training prompts", f"{num_prompts:,}"))
    chunks = f"M = {args.num_chunks} of at most C = {args.chunk_length} tokens, N = {args.num_rollouts} rollouts each"
    rows.append(("chunks", chunks))
    rows.append(("prior strength alpha, anchor beta", f"{args.prior_strength:g}, {args.beta:g}"))
    rows.append(("similarity phi", f"`{_name(similarity)}`"))
    rows.append(("baseline of the posterior", f"`{_name(weights)}`"))
    rows.append(("optimizer steps, learning rate", f"{num_steps:,}, {args.learning_rate:g}"))
    scores = series(log_history, "eval_pass@1")
    if scores:
        ends = scores if len(scores) == 1 else (scores[0], scores[-1])
        rows.append(("pass@1", " → ".join(f"{score:.3f} (step {step:g})" for step, score in ends)))
    rows.append(("teacher tokens", f"{usage.prompt_tokens:,} read, {usage.completion_tokens:,} written"))
    dollars = series(log_history, "teacher/usd_total")
    if dollars:
        rows.append(("cost", f"{dollars[-1][1]:,.2f} US dollars"))
    parts = [
        "### Distillation",
        "The student wrote its own solutions. At its most uncertain places, the teacher wrote what it would have said "
        "next, as text, and their similarity was the training signal.",
        "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)]),
    ]
    if figure is not None:
        parts.append(f"![{figure}]({FIGURE})")
    if is_adapter and is_local:
        parts.append(
            "This adapter belongs to the local model. It does not fit the model that the local one is derived from."
        )
    parts.append(TERMS)
    return "\n\n".join(parts) + "\n\n"


def _name(value: str | Callable[..., Any]) -> str:
    return value if isinstance(value, str) else getattr(value, "__name__", type(value).__name__)


def _basename(name: str) -> str:
    """A path says something about a machine, so only its end is published."""
    return os.path.basename(os.path.normpath(name)) if os.path.exists(name) else name


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


def complete_card(
    path: Path,
    section: str,
    *,
    base_model: str | None,
    adapter: str | None,
    result: EvalResult | None,
) -> None:
    """Correct the metadata of TRL's card, and add the section on the training and the package's version.

    Args:
        path: the card.
        section: result of [`training_section`].
        base_model: result of [`base_model_of`].
        adapter: type of the adapter, such as `"LORA"`; `None` for a full model.
        result: result of [`evaluation_result`].
    """
    card = ModelCard.load(path)
    data = card.data
    data.pop("licence")  # a placeholder of TRL
    data.pipeline_tag = "text-generation"
    data.base_model = base_model
    if base_model is not None:
        data.base_model_relation = "finetune" if adapter is None else "adapter"
    if adapter is not None:
        data.library_name = "peft"
        data.tags = [*(data.tags or []), adapter.lower(), "transformers"]
        data.tags += [] if base_model is None else [f"base_model:adapter:{base_model}"]
    if result is not None:
        data.eval_results = [result]
        data.model_name = data.model_name or path.resolve().parent.name
    named = "model" if base_model is None else f"version of [{base_model}](https://huggingface.co/{base_model})"
    card.text = re.sub(r"(a fine-tuned )version of \[[^\]]*\]\([^)]*\)", rf"\g<1>{named}", card.text, count=1)
    card.text = card.text.replace('model="None"', f'model="{path.resolve().parent.name}"')  # not pushed
    versions = "### Framework versions\n\n"
    card.text = card.text.replace(versions, f"{section}{versions}- omniopd_trl: {version('omniopd_trl')}\n")
    card.save(path)
