# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Parse a recipe and load its datasets. The checks that do not import TRL are in [`options`]."""

import argparse
import importlib
import inspect
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser

from omniopd_trl.cli.hints import SECTIONS
from omniopd_trl.cli.options import (
    check_arguments,
    check_method_name,
    parse_section,
    resolve_demo_name,
    split_config,
    stray_word,
)
from omniopd_trl.errors import ConfigError, OmniOPDError
from omniopd_trl.trainer.help_texts import entries_of, with_help

if TYPE_CHECKING:
    from omniopd_trl.trainer.omniopd_config import OmniOPDConfig


@dataclass
@with_help
class OmniOPDScriptArguments(ScriptArguments):
    """
    Arguments of the training command, in addition to [`~trl.ScriptArguments`].

    Args:
        dataset_name (`str`, *optional*):
            Id of a dataset on the Hub; path of a .json, .jsonl or .parquet file or of a folder of these;
            `"benchmark:TRAINING,EVALUATION"` for sets of docs/datasets.md; or `"reasoning_gym:TASK"`.
        prompt_template (`str`, *optional*):
            Template that turns a `question` or `problem` column into a prompt: `"math"` (the paper's Table 7), or a
            string that contains `{question}` once. By default, the question itself is the prompt.
        evaluate_teacher (`bool`, *optional*, defaults to `False`):
            Whether to measure the teacher's pass@1 on the evaluation set after training.
        method (`str`, *optional*, defaults to `"omniopd"`):
            What to train with: `"omniopd"`; or a baseline, with TRL's own trainer and the same evaluation: `"sft"` on
            the teacher's solutions, `"opd"` on the probabilities of a local teacher, or `"grpo"` on rewards.
        solutions (`str`, *optional*):
            Solutions of the teacher: the folder that `omniopd solutions` writes and method `"sft"` trains on, or any
            dataset with the columns `prompt` and `completion`. Defaults to `solutions` in `output_dir`.
        reward_funcs (`list[str]`, *optional*):
            Functions that score answers, in the evaluation of every method, as the reward of method `"grpo"`, and as
            that of `"omniopd"` if `reward_weight` or `audit_trajectories` use rewards: dotted paths of functions with
            the signature of TRL's `reward_funcs`, such as `my_package.rewards.code`, or ids or paths of sequence
            classification models. By default, math-verify compares with the `solution` or `answer` column, and
            programs are run on the column `tests`.
        sft (`dict[str, Any]`, *optional*):
            Options of [`~trl.SFTConfig`] that apply to method `"sft"` only, such as `{"learning_rate": 1e-5}`.
        opd (`dict[str, Any]`, *optional*):
            Options of [`~trl.DistillationConfig`] that apply to method `"opd"` only. `beta` defaults to 0.5 there.
        grpo (`dict[str, Any]`, *optional*):
            Options of [`~trl.GRPOConfig`] that apply to method `"grpo"` only, such as `{"num_generations": 8}`.
    """

    dataset_name: str | None = None
    prompt_template: str | None = None
    evaluate_teacher: bool = False
    method: str = "omniopd"
    solutions: str | None = None
    reward_funcs: list[str] | None = None
    sft: dict[str, Any] | str | None = None
    opd: dict[str, Any] | str | None = None
    grpo: dict[str, Any] | str | None = None

    def __post_init__(self) -> None:
        check_method_name(self.method)
        for name in SECTIONS:
            setattr(self, name, parse_section(name, getattr(self, name)))


def dataclass_types() -> tuple[type, ...]:
    """The dataclasses whose fields are the options of a recipe."""
    from omniopd_trl.trainer.omniopd_config import OmniOPDConfig

    return OmniOPDScriptArguments, OmniOPDConfig, ModelConfig, DatasetMixtureConfig


def make_parser(
    subparsers: "argparse._SubParsersAction[Any] | None" = None, command: str | None = None
) -> argparse.ArgumentParser:
    """The parser of a command that reads a recipe, or of a subcommand `train` as in TRL.

    Args:
        subparsers: the subcommands.
        command: the command in messages, with what it needs before the options. Defaults to the training as a module.
    """
    command = command or "python -m omniopd_trl.train --config RECIPE.yaml"
    settings: dict[str, Any] = {
        "description": "Distil a text-only teacher into a student with OmniOPD.",
        # The generated usage line would list some three hundred options, and every error prints it.
        "usage": f"{command} [--OPTION VALUE ...]",
        # An abbreviated option may be mistyped, so `--num_chunk` must not be read as `--num_chunks`.
        "allow_abbrev": False,
    }
    if subparsers is not None:
        parser = subparsers.add_parser(
            "train", help="Train a student from a recipe", dataclass_types=dataclass_types(), **settings
        )
    else:
        parser = TrlParser(dataclass_types(), prog=command.partition(" --")[0], **settings)
    _group_options(parser)
    return parser


# The first options of `--help`. Then come those of `OmniOPDConfig`, in the groups of its docstring, and the inherited
# ones.
_FIRST = {
    "Student, teacher and data": (
        *("model_name_or_path", "teacher_model_name_or_path", "dataset_name", "dataset_config", "dataset_train_split"),
        *("dataset_test_split", "prompt_template", "evaluate_teacher", "output_dir"),
    ),
    "Method and baselines": ("method", "solutions", "reward_funcs", *SECTIONS),
}


def option_groups() -> dict[str, list[str]]:
    """The option names by group title of `--help`: first those of this package, then the inherited ones."""
    groups = {title: list(names) for title, names in _FIRST.items()}
    script, config, model, mixture = dataclass_types()
    for title, name, _ in entries_of(config):
        groups.setdefault(title, []).append(name)
    for origin in (*config.__mro__, *script.__mro__, model, mixture):
        names = [name for name in inspect.get_annotations(origin) if not name.startswith("_")]
        package = origin.__module__.partition(".")[0]
        groups.setdefault(f"Inherited from {package}: {origin.__name__}", []).extend(names)
    return groups


def _group_options(parser: argparse.ArgumentParser) -> None:
    """Move the options into groups. argparse has no public way to move an option that was already added."""
    options = parser._optionals._group_actions
    for title, names in option_groups().items():
        group = parser.add_argument_group(title)
        group._group_actions += [action for name in names for action in options if action.dest == name]
        options[:] = [action for action in options if action.dest not in names]


def parse_args(
    args: Sequence[str] | None = None, command: str | None = None
) -> "tuple[OmniOPDScriptArguments, OmniOPDConfig, ModelConfig, DatasetMixtureConfig]":
    """Parse the command line and its recipe.

    Args:
        args: the command line; `None` uses that of the process.
        command: as for [`make_parser`].

    Returns:
        `(script_args, training_args, model_args, dataset_args)`.

    Raises:
        ConfigError: for an unknown option, a value of the wrong type, or settings that contradict each other.
    """
    arguments = split_config(sys.argv[1:] if args is None else args)
    check_arguments(arguments)
    parser = make_parser(command=command)
    try:
        *parsed, strays = parser.parse_args_and_config(arguments, return_remaining_strings=True)  # type: ignore[attr-defined]
    except OmniOPDError:
        raise
    except OverflowError as error:
        raise ConfigError(f"A number of the recipe or the command line is too large ({error}). Lower it.") from error
    except (ValueError, TypeError) as error:
        # Errors from the checks of the inherited configurations. The message is enough without a traceback.
        raise ConfigError(str(error)) from error
    if strays:
        raise stray_word(strays[0])
    for part in parsed:
        for item in fields(part):
            if item.name.endswith(("name_or_path", "dataset_name")):
                setattr(part, item.name, resolve_demo_name(getattr(part, item.name)))
    return tuple(parsed)


def load_splits(script_args: OmniOPDScriptArguments, dataset_args: DatasetMixtureConfig) -> Mapping[str, Any]:
    """Load the dataset or the mixture of datasets of the recipe.

    Raises:
        ConfigError: when neither or both are set.
        DataError: when a dataset cannot be loaded.
    """
    from trl import get_dataset

    from omniopd_trl.data.benchmarks import BENCHMARK, GYM, load_benchmark_splits
    from omniopd_trl.data.datasets import load_dataset_or_files, local_builder

    if dataset_args.datasets:
        if script_args.dataset_name:
            raise ConfigError(
                f"Both `datasets` and `dataset_name` ({script_args.dataset_name!r}) are set, and only one can be "
                "used. Remove one of them."
            )
        for part in dataset_args.datasets:
            if (local := local_builder(part.path)) is not None:
                part.path, part.data_files = local[0], {part.split: local[1]}
        return get_dataset(dataset_args)
    if not script_args.dataset_name:
        raise ConfigError(
            "No dataset is named. Set `dataset_name` (the id of a dataset on the Hub, a local .json, .jsonl or "
            ".parquet file, a folder of them, or a named set: `benchmark:NAME`), or `datasets` for a mixture."
        )
    if script_args.dataset_name.startswith((BENCHMARK, GYM)):
        if script_args.dataset_config or script_args.dataset_streaming:
            raise ConfigError(
                f"dataset_name={script_args.dataset_name!r} names sets whose configurations are known, and which "
                "are not streamed. Leave out `dataset_config` and `dataset_streaming`."
            )
        splits = load_benchmark_splits(script_args.dataset_name)
        if script_args.prompt_template is not None and script_args.dataset_name.startswith(GYM):
            return splits.remove_columns("prompt")  # the recipe's template replaces that of the set
        return splits
    return load_dataset_or_files(script_args.dataset_name, script_args.dataset_config, script_args.dataset_streaming)


def load_prompts(script_args: OmniOPDScriptArguments, dataset_args: DatasetMixtureConfig) -> Any:
    """The training set of the recipe, with a checked prompt in each row.

    Raises:
        ConfigError, DataError: as [`load_splits`]; and when a row has no prompt.
    """
    from omniopd_trl.data.checks import check_dataset
    from omniopd_trl.data.datasets import get_split
    from omniopd_trl.data.prompts import prepare_prompts

    splits = load_splits(script_args, dataset_args)
    dataset = get_split(splits, script_args.dataset_train_split, "dataset_train_split")
    dataset = prepare_prompts(dataset, script_args.prompt_template)
    check_dataset(dataset)
    return dataset


def load_functions(names: Sequence[str] | None) -> list[Any] | None:
    """The functions of dotted paths such as `my_package.rewards.code`; ids and paths of models are left as they are.

    Modules are looked up in the working directory, too.

    Raises:
        ConfigError: when a module cannot be imported, or has no such function.
    """
    functions: list[Any] = []
    for name in names or ():
        module, dot, attribute = name.rpartition(".")
        if not dot or not name.replace(".", "_").isidentifier():
            functions.append(name)
            continue
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        try:
            functions.append(getattr(importlib.import_module(module), attribute))
        except (ImportError, AttributeError) as error:
            raise ConfigError(
                f"`reward_funcs` names {name!r}, which cannot be imported ({error}). Give the dotted path of a "
                "function, or the id or path of a sequence classification model."
            ) from error
    return functions or None
