# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""A recipe: its options, and what is checked of them before anything is loaded."""

import argparse
import difflib
import sys
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser

from omniopd_trl.errors import ConfigError, OmniOPDError

if TYPE_CHECKING:
    from omniopd_trl.trainer.omniopd_config import OmniOPDConfig


@dataclass
class OmniOPDScriptArguments(ScriptArguments):
    """
    Arguments of the training command, in addition to [`~trl.ScriptArguments`].

    Args:
        prompt_template (`str`, *optional*):
            How a `question` or `problem` column becomes a prompt: a built-in name (`"math"`, the paper's Table 7), or
            a text that holds `{question}` once. Without it the question itself is the prompt.
        evaluate_teacher (`bool`, *optional*, defaults to `False`):
            Whether to measure the teacher's pass@1 on the evaluation set, too, after training.
    """

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Id of a dataset on the Hub, or a local .json, .jsonl or .parquet file, or a folder of such files."
        },
    )
    prompt_template: str | None = field(
        default=None,
        metadata={
            "help": "How a `question` or `problem` column becomes a prompt: a built-in name ('math', the paper's "
            "Table 7), or a text that holds {question} once. Without it the question itself is the prompt."
        },
    )
    evaluate_teacher: bool = field(
        default=False,
        metadata={"help": "Whether to measure the teacher's pass@1 on the evaluation set, too, after training."},
    )


def make_parser(
    subparsers: "argparse._SubParsersAction[Any] | None" = None, prog: str | None = None
) -> argparse.ArgumentParser:
    """The parser of the command, or of a subcommand `train`, by TRL's convention."""
    from omniopd_trl.trainer.omniopd_config import OmniOPDConfig

    dataclass_types = (OmniOPDScriptArguments, OmniOPDConfig, ModelConfig, DatasetMixtureConfig)
    prog = prog or "python -m omniopd_trl.train"
    settings: dict[str, Any] = {
        "description": "Distil a text-only teacher into a student with OmniOPD.",
        # The generated usage line would list some three hundred options, and every error prints it.
        "usage": f"{prog} --config RECIPE.yaml [--OPTION VALUE ...]",
        # An abbreviated option is a mistyped one: `--num_chunk` must not pass for `--num_chunks`.
        "allow_abbrev": False,
    }
    if subparsers is not None:
        return subparsers.add_parser(
            "train", help="Train a student from a recipe", dataclass_types=dataclass_types, **settings
        )
    return TrlParser(dataclass_types, prog=prog, **settings)


def parse_args(
    args: Sequence[str] | None = None,
) -> "tuple[OmniOPDScriptArguments, OmniOPDConfig, ModelConfig, DatasetMixtureConfig]":
    """Parse the command line and the recipe that it names.

    Args:
        args: the command line; `None` takes that of the process.

    Returns:
        `(script_args, training_args, model_args, dataset_args)`.

    Raises:
        ConfigError: for an option that does not exist, a value of the wrong type, or settings that contradict each
            other.
    """
    parser = make_parser()
    arguments = split_config(sys.argv[1:] if args is None else args)
    check_arguments(arguments, option_hints(parser.dataclass_types))  # type: ignore[attr-defined]
    try:
        return parser.parse_args_and_config(arguments)  # type: ignore[attr-defined]
    except OmniOPDError:
        raise
    except (ValueError, TypeError) as error:
        # The checks of the inherited configurations; their messages say what is wrong, the traceback would not.
        raise ConfigError(str(error)) from error


def split_config(args: Iterable[str]) -> list[str]:
    """The command line with `--config=x.yaml` as two words, since TRL knows `--config x.yaml` only."""
    return [part for arg in args for part in (arg.split("=", 1) if arg.startswith("--config=") else [arg])]


def option_names(hints: Mapping[str, Any]) -> list[str]:
    """Every name that the command line may hold after `--`."""
    return [*hints, *(f"no_{name}" for name in hints), "config", "help"]


def option_name(argument: str) -> str:
    """The name in `--name`, `--name=value` or `--na-me`, as Python spells it."""
    return argument.partition("=")[0].removeprefix("--").replace("-", "_")


def check_arguments(arguments: Sequence[str], hints: Mapping[str, Any]) -> dict[str, Any]:
    """Refuse options that do not exist, on the command line or in the recipe that it names.

    Args:
        arguments: the command line, from [`split_config`].
        hints: the type of each option.

    Returns:
        The recipe; empty when none is named.

    Raises:
        ConfigError: names what is wrong, and the next step.
    """
    options = [argument for argument in arguments if argument.startswith("--")]
    check_names(map(option_name, options), option_names(hints), "the command line")
    if "--config" not in arguments:
        return {}
    position = arguments.index("--config") + 1
    if position == len(arguments):
        raise ConfigError("`--config` needs the path of a recipe, such as recipes/demo.yaml.")
    return check_recipe(arguments[position], hints)


def option_hints(dataclass_types: Iterable[type]) -> dict[str, Any]:
    """The type of each option, by name."""
    hints: dict[str, Any] = {}
    for dataclass_type in dataclass_types:
        own = typing.get_type_hints(dataclass_type)
        hints.update({item.name: own[item.name] for item in fields(dataclass_type) if item.init})
    # Declared as a text; the Trainer, and this command, take `true` as well.
    hints["resume_from_checkpoint"] = str | bool | None
    return hints


def check_names(names: Iterable[str], known: Sequence[str], where: str) -> None:
    """Refuse options that do not exist.

    Raises:
        ConfigError: names the option, and the most similar one that exists.
    """
    for name in names:
        if name not in known:
            similar = difflib.get_close_matches(name, known, n=1)
            advice = f"Did you mean `{similar[0]}`?" if similar else "`--help` lists the options."
            raise ConfigError(f"There is no option `{name}` (in {where}). {advice}")


def check_recipe(path: str, hints: Mapping[str, Any]) -> dict[str, Any]:
    """Refuse a recipe with unknown keys, or with values of the wrong type, which the parser takes as they are.

    A text is left to the parser, which converts it as it would on the command line (`1e-6` is a text in YAML 1.1).

    Args:
        path: of the YAML file.
        hints: the type of each option.

    Returns:
        The recipe, as YAML reads it.

    Raises:
        ConfigError: names the key, the value, and what it must be.
    """
    import yaml

    try:
        recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"The recipe {path!r} cannot be read ({error.strerror}). Check the path.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"The recipe {path!r} is not valid YAML: {error}") from error
    if not isinstance(recipe, dict):
        raise ConfigError(f"The recipe {path!r} must be a YAML mapping of options to values, such as `beta: 0.1`.")
    check_names([str(key) for key in recipe], [*hints, "env"], path)
    for key, value in recipe.items():
        if key != "env" and not _fits(value, hints[key]):
            hint = hints[key]
            expected = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
            advice = ""
            if isinstance(value, bool):
                advice = " YAML reads a bare yes, no, on or off as true or false: put it in quotes."
            raise ConfigError(
                f"`{key}` is {value!r} ({type(value).__name__}) in {path}; it must be of type {expected}.{advice}"
            )
    return recipe


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value that YAML read can be one of type `hint`."""
    if hint is Any:
        return True
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in typing.get_args(hint))
    if isinstance(value, str):
        return True
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    kind = origin or hint
    if isinstance(value, bool):
        return kind is bool
    if isinstance(value, int):
        return kind in (int, float)
    return isinstance(value, kind)


def load_splits(script_args: OmniOPDScriptArguments, dataset_args: DatasetMixtureConfig) -> Mapping[str, Any]:
    """Load the dataset, or the mixture of datasets, that the recipe names.

    Raises:
        ConfigError: when none is named, or both are.
        DataError: when it cannot be loaded.
    """
    from trl import get_dataset

    from omniopd_trl.data.datasets import load_dataset_or_files, local_builder

    if dataset_args.datasets:
        if script_args.dataset_name:
            raise ConfigError(
                f"Both `datasets` and `dataset_name` ({script_args.dataset_name!r}) are set, and only one can be "
                "used. Remove one of them."
            )
        for part in dataset_args.datasets:
            builder = local_builder(part.path)
            if builder is not None:
                part.path, part.data_files = builder, {part.split: part.path}
        return get_dataset(dataset_args)
    if not script_args.dataset_name:
        raise ConfigError(
            "No dataset is named. Set `dataset_name` (the id of a dataset on the Hub, a local .json, .jsonl or "
            ".parquet file, or a folder of them), or `datasets` for a mixture."
        )
    return load_dataset_or_files(script_args.dataset_name, script_args.dataset_config, script_args.dataset_streaming)
