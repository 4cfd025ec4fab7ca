# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""`omniopd recipes` lists or copies the recipes that ship with the package."""

import shutil
import sys
from pathlib import Path

from omniopd_trl.errors import ConfigError, did_you_mean

# In a wheel, the recipes are inside the package; in a clone, they are beside it.
_FOLDERS = (Path(__file__).parents[1] / "recipes", Path(__file__).parents[2] / "recipes")
FOLDER = next((folder for folder in _FOLDERS if folder.is_dir()), _FOLDERS[0])


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
