# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The model card: TRL's, with what a reader of a distilled model needs to know."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError

from omniopd_trl.accounting.usage import Usage
from omniopd_trl.trainer.omniopd_config import OmniOPDConfig

TERMS = (
    "The terms of the teacher's provider may restrict the use of models that were trained with its outputs. Check "
    "them before you publish or use this model."
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
        base = ModelCard.load(folder / "README.md").data.get("base_model")
    except (OSError, ValueError, HfHubHTTPError):
        base = None
    if isinstance(base, list):
        base = base[0] if base else None
    for file, key in (("adapter_config.json", "base_model_name_or_path"), ("config.json", "_name_or_path")):
        if not base and (folder / file).exists():
            base = json.loads((folder / file).read_text("utf-8")).get(key)
    return base if isinstance(base, str) else None


def training_section(
    args: OmniOPDConfig,
    *,
    teacher: str,
    served: Sequence[str],
    is_remote: bool,
    usage: Usage,
    log_history: Sequence[Mapping[str, Any]],
    num_steps: int,
) -> str:
    """The card's section on the training, as Markdown.

    Args:
        args: configuration of the run.
        teacher: name of the teacher.
        served: names of the models that the service says it served.
        is_remote: whether the teacher is behind a service.
        usage: tokens of all requests.
        log_history: the logged metrics, whose `eval_pass@1` and `teacher/usd_total` are reported.
        num_steps: number of optimizer steps.
    """
    rows = [("teacher", f"`{_basename(teacher)}`" + (f", served as {', '.join(served)}" if served else ""))]
    chunks = f"M = {args.num_chunks} of at most C = {args.chunk_length} tokens, N = {args.num_rollouts} rollouts each"
    if args.num_branches:
        chunks += f", compared with K = {args.num_branches} branches besides"
    rows.append(("chunks", chunks))
    rows.append(("prior strength alpha, anchor beta", f"{args.prior_strength:g}, {args.beta:g}"))
    rows.append(("similarity phi", f"`{args.similarity}`"))
    rows.append(("baseline of the posterior", f"`{args.posterior_baseline}`"))
    rows.append(("optimizer steps, learning rate", f"{num_steps:,}, {args.learning_rate:g}"))
    scores = [(entry["step"], entry["eval_pass@1"]) for entry in log_history if entry.get("eval_pass@1") is not None]
    if scores:
        rows.append(("pass@1", " → ".join(f"{score:.3f} (step {step})" for step, score in (scores[0], scores[-1]))))
    rows.append(("teacher tokens", f"{usage.prompt_tokens:,} read, {usage.completion_tokens:,} written"))
    dollars = [entry["teacher/usd_total"] for entry in log_history if "teacher/usd_total" in entry]
    if dollars:
        rows.append(("cost", f"{dollars[-1]:,.2f} US dollars"))
    table = "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)])
    terms = f"\n\n{TERMS}" if is_remote else ""
    return (
        "### Distillation\n\nThe student wrote its own solutions. At its most uncertain places, the teacher wrote "
        "what it would have said next, as text, and their similarity was the training signal.\n\n"
        f"{table}{terms}\n\n"
    )


def _basename(name: str) -> str:
    """A path says something about a machine, so only its end is published."""
    return os.path.basename(os.path.normpath(name)) if os.path.exists(name) else name


def complete_card(path: Path, base_model: str | None, section: str) -> None:
    """Correct the base model of TRL's card, and add the section on the training and the package's version.

    Args:
        path: the card.
        base_model: result of [`base_model_of`].
        section: result of [`training_section`].
    """
    card = ModelCard.load(path)
    card.data.base_model = base_model
    named = "model" if base_model is None else f"version of [{base_model}](https://huggingface.co/{base_model})"
    card.text = re.sub(r"(a fine-tuned )version of \[[^\]]*\]\([^)]*\)", rf"\g<1>{named}", card.text, count=1)
    card.text = card.text.replace('model="None"', f'model="{path.resolve().parent.name}"')  # not pushed
    versions = "### Framework versions\n\n"
    card.text = card.text.replace(versions, f"{section}{versions}- omniopd_trl: {version('omniopd_trl')}\n")
    card.save(path)
