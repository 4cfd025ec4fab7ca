# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""`omniopd recipes` lists or copies the recipes that ship with the package; `omniopd demo` runs the smallest one."""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from omniopd_trl.errors import ConfigError, did_you_mean

# In a wheel, the recipes are inside the package; in a clone, they are beside it.
_FOLDERS = (Path(__file__).parents[1] / "recipes", Path(__file__).parents[2] / "recipes")
FOLDER = next((folder for folder in _FOLDERS if folder.is_dir()), _FOLDERS[0])

_DEMO_HELP = """\
usage: omniopd demo [--OPTION VALUE ...]

Train the student of the demo, which ships with the package, in one process on the CPU. This needs no network and no
GPU, and takes about two minutes of one core. The student forgets carries in word problems; the teacher corrects it by
text alone. The run measures pass@1 before and after on 512 problems, and ends with a table. The model and the answers
of the teacher are written to ./runs/demo.

  --seed 1, --learning_rate 1e-4, --output_dir elsewhere, ...
      any option of a recipe; `omniopd recipes demo` copies the recipe itself into the current folder
"""


def recipe_files() -> dict[str, Path]:
    """The recipes that ship with the package, by name."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}


def describe(path: Path) -> str:
    """The description of a recipe: the first line of its comment."""
    return path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")


def recipes(name: str | None) -> None:
    """List the recipes, or copy one into the current folder.

    Args:
        name: name of the recipe to copy; `None` lists all.

    Raises:
        ConfigError: when there is no such recipe, or when a file of that name exists in the current folder.
    """
    files = recipe_files()
    if name is None:
        width = max(map(len, files), default=0)
        lines = [f"{name:<{width}}  {describe(path)}" for name, path in files.items()]
        lines += [
            "",
            "`omniopd recipes NAME` copies one into the current folder; `omniopd train --config FILE` runs it.",
        ]
        sys.stdout.write("\n".join(lines) + "\n")
        return
    stem = name.removesuffix(".yaml")
    if stem not in files:
        raise ConfigError(f"There is no recipe {name!r}. {did_you_mean(stem, files)}")
    target = Path(files[stem].name)
    if target.exists():
        raise ConfigError(f"There is a file {target} in the current folder. Rename or remove it first.")
    shutil.copyfile(files[stem], target)
    sys.stdout.write(f"Wrote {target}. Run it with `omniopd train --config {target}`.\n")


def demo(arguments: Sequence[str]) -> int:
    """Run the recipe of the demo in this process.

    Args:
        arguments: options that override the recipe.

    Returns:
        The exit code of the training.
    """
    if {"-h", "--help"} & set(arguments):
        sys.stdout.write(_DEMO_HELP)
        return 0
    from omniopd_trl.cli.train import run

    sys.stdout.write(
        "Training the student of the demo on the CPU, in about two minutes of one core. It is evaluated before and "
        "after.\n"
    )
    sys.stdout.flush()
    return run(["--config", str(recipe_files()["demo"]), *arguments])
