# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""What commands do before the slow imports: refuse mistyped options of a recipe, and prepare the process."""

import io
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from omniopd_trl.cli.noise import filter_noise
from omniopd_trl.cli.options import LOADED, apply_env, check_arguments, check_paths, split_config
from omniopd_trl.errors import ConfigError


def open_streams() -> None:
    """Let no output end a command: not a character that the terminal's encoding lacks, nor a stream that is closed."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def drop_output() -> None:
    """Drop what is still to be written, whose reader has ended, as in `omniopd audits runs/demo --jsonl | head -1`."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def with_recipe(command: str, config: str | None, rest: Sequence[str]) -> list[str]:
    """The command line for the parser of recipes.

    Args:
        command: name of the command, for the message.
        config: value of `--config`.
        rest: options of the training command.

    Raises:
        ConfigError: without a recipe.
    """
    if config is None:
        raise ConfigError(f"`omniopd {command}` needs a recipe: add `--config RECIPE.yaml`.")
    return ["--config", config, *rest]


def open_recipe(arguments: Sequence[str], paths: Iterable[str] = LOADED) -> tuple[list[str], dict[str, Any]]:
    """Check a command line and its recipe, set the recipe's environment, and hide messages of other packages.

    Neither torch nor TRL is imported: a mistyped option is refused in less than a second.

    Args:
        arguments: the command line.
        paths: names of the options whose paths must exist.

    Returns:
        The command line as the parser reads it, and the recipe; an empty one without `--config`.

    Raises:
        ConfigError: for an unknown option, or a recipe that cannot be used.
        DataError: for a path that does not exist.
    """
    arguments = split_config(arguments)
    recipe = check_arguments(arguments)
    check_paths(arguments, recipe, paths)
    apply_env(recipe)
    filter_noise(arguments, recipe)
    return arguments, recipe


def check_writable(folder: str | Path) -> None:
    """Refuse a folder for results that can be neither written to nor created. Nothing is created.

    Raises:
        ConfigError: when the folder, or what is there of its path, is a file or is read-only.
    """
    if not str(folder):
        raise ConfigError("`output_dir` is empty. Name a folder.")
    path = Path(folder).absolute()
    there = next(part for part in (path, *path.parents) if part.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        problem = "cannot be written to" if there.is_dir() else "is a file"
        raise ConfigError(f"Results cannot be written to {str(folder)!r}: {there} {problem}. Choose another folder.")


def check_models(config: str | None, **models: str | None) -> None:
    """Refuse a recipe that does not name a model.

    Args:
        config: value of `--config`, for the message.
        **models: values of the options that name the models.

    Raises:
        ConfigError: for an option that is not set.
    """
    for name, value in models.items():
        if value is None:
            raise ConfigError(f"The recipe {config!r} does not set `{name}`. Set it to a model's id or path.")
