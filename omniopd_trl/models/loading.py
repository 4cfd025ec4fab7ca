# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Loading a model or its tokenizer: a progress bar that names it, and why it cannot be loaded."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from omniopd_trl.errors import DataError, did_you_mean, first_line


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Context in which the bar "Loading weights" of `transformers` names the model: student, teacher or reference."""

    def named(factory: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs.get("desc") == "Loading weights":
            kwargs = {**kwargs, "desc": f"Loading weights of the {what}"}
        return factory(*args, **kwargs) if previous is None else previous(factory, args, kwargs)

    previous = logging.set_tqdm_hook(named)
    try:
        yield
    finally:
        logging.set_tqdm_hook(previous)


def load_tokenizer(
    student: str, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a student, with padding and truncation on the left.

    Args:
        student: path or id of the student.
        revision: its revision on the Hub.
        trust_remote_code: whether code of the repository may run.

    Raises:
        DataError: when it cannot be loaded.
    """
    try:
        return AutoTokenizer.from_pretrained(
            student,
            revision=revision,
            truncation_side="left",
            padding_side="left",
            trust_remote_code=trust_remote_code,
        )
    except (OSError, ValueError) as error:
        raise DataError(
            f"No tokenizer can be loaded for the student {student!r}: {why_not_loaded(student, error)}"
        ) from error


def why_not_loaded(name: str, error: Exception) -> str:
    """One line on why a model cannot be loaded: what is in the folder of its name, or else near it, and what to do.

    Args:
        name: path of a folder, or id of a model on the Hub.
        error: the error of `transformers`, of which the first line is quoted.
    """
    folder, reason = Path(name), first_line(error)
    if isinstance(error, ImportError):  # a package for its quantization or its attention
        return reason
    if folder.is_dir():
        checkpoints = sorted(path.parent.name for path in folder.glob("checkpoint-*/config.json"))
        if (folder / "adapter_config.json").is_file():
            return (
                "the folder holds a LoRA adapter and no model. Merge it and name the result: "
                f"`AutoPeftModelForCausalLM.from_pretrained({name!r}).merge_and_unload().save_pretrained(FOLDER)`. Or "
                f"pass the trainer `AutoPeftModelForCausalLM.from_pretrained({name!r}, is_trainable=True)`."
            )
        if not (folder / "config.json").is_file():
            advice = f"Name one of its checkpoints: {', '.join(checkpoints)}." if checkpoints else "Check the path."
            return f"the folder holds no model (no config.json). {advice}"
        return f"{reason} Check that the folder is a complete model of a kind that continues text."
    nearby = what_is_beside(name) or "there is no such folder. "
    return f"{nearby}The name was looked up on the Hub ({reason}). Check the path or the id."


def what_is_beside(name: str) -> str:
    """A sentence on the folder that a name points into, if that is here: what it lacks, and a similar name in it."""
    path = Path(name)
    if path.parent == Path() or not path.parent.is_dir():
        return ""
    there = [entry.name for entry in path.parent.iterdir()]
    advice = did_you_mean(path.name, there, otherwise="", written=lambda entry: str(path.parent / entry))
    return f"the folder {str(path.parent)!r} is here and has no {path.name!r}. " + (advice and f"{advice} ")
