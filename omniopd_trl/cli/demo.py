# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""`omniopd demo`: train the small student that ships with the package."""

import sys
from collections.abc import Sequence

from omniopd_trl.cli import train
from omniopd_trl.cli.recipes import recipe_files
from omniopd_trl.cli.tables import say

_HELP = """\
usage: omniopd demo [--OPTION VALUE ...]

Train the student of the demo, which ships with the package, in one process on the CPU. This needs no network and no
GPU, and takes about two minutes of one core. The student forgets carries in word problems; the teacher corrects it by
text alone. The run measures pass@1 before and after on 512 problems, and ends with a table. The model and the answers
of the teacher are written to ./runs/demo.

  --seed 1, --learning_rate 1e-4, --output_dir elsewhere, ...
      any option of a recipe; `omniopd recipes demo` copies the recipe itself into the current folder
"""


def demo(arguments: Sequence[str]) -> int:
    """Run the recipe of the demo in this process.

    Args:
        arguments: options that override the recipe.

    Returns:
        The exit code of the training.
    """
    if {"-h", "--help"} & set(arguments):
        sys.stdout.write(_HELP)
        return 0
    say(
        "Training the student of the demo on the CPU, in about two minutes of one core. It is evaluated before and "
        "after."
    )
    return train.run(["--config", str(recipe_files()["demo"]), *arguments], "omniopd demo")
