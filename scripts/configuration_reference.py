# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Write the tables of docs/configuration.md from the configuration classes.

    python -m scripts.configuration_reference           # write
    python -m scripts.configuration_reference --check   # exit 1 if the page is not what would be written

What stands outside of the two marks in the page is written by hand and stays.
"""

import argparse
import dataclasses
import json
import re
import sys
import typing
from pathlib import Path
from typing import Any

from omniopd_trl.cli.recipe import OmniOPDScriptArguments
from omniopd_trl.trainer.omniopd_config import OmniOPDConfig
from scripts.pages import update

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"
BEGIN = "<!-- Written by `make docs`; do not edit below this line. -->"
END = "<!-- Written by `make docs`; do not edit above this line. -->"

_GROUP = re.compile(r"^ *> (Parameters that control .+)$")
_ENTRY = re.compile(r"^ *(\w+) \(`.*\):$")


def groups_of(config: type) -> dict[str, list[str]]:
    """The fields that a configuration class itself defines, in the groups of its docstring.

    Raises:
        ValueError: when the docstring and the class do not name the same fields.
    """
    groups: dict[str, list[str]] = {}
    fields: list[str] = []
    for line in (config.__doc__ or "").splitlines():
        if match := _GROUP.match(line):
            fields = groups.setdefault(match[1], [])
        elif groups and (match := _ENTRY.match(line)):
            fields.append(match[1])
    documented = {name for group in groups.values() for name in group}
    own = {field.name for field in own_fields(config)}
    if documented != own:
        raise ValueError(
            f"The docstring of {config.__name__} and its fields differ: {sorted(documented ^ own)}. Every field that "
            "the class defines has one entry, in a group that begins with `> Parameters that control`."
        )
    return groups


def own_fields(config: type) -> list[dataclasses.Field[Any]]:
    """The dataclass fields that the class itself defines or redefines, without those it only inherits."""
    return [field for field in dataclasses.fields(config) if field.name in config.__annotations__]


def table(config: type, names: list[str] | None = None) -> str:
    """A Markdown table of fields; by default, of all that the class itself defines."""
    hints = typing.get_type_hints(config)
    fields = {field.name: field for field in own_fields(config)}
    rows = ["| option | type | default | meaning |", "|---|---|---|---|"]
    for name in fields if names is None else names:
        field = fields[name]
        hint = hints[name]
        kind = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
        # A pipe would end the cell.
        cells = [f"`{name}`", f"`{kind}`", f"`{json.dumps(field.default)}`", field.metadata["help"]]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


def render() -> str:
    """The part of the page between the marks."""
    parts = []
    for title, names in groups_of(OmniOPDConfig).items():
        parts += [f"## {title}", table(OmniOPDConfig, names)]
    parts += ["## Options of the training command", table(OmniOPDScriptArguments)]
    return "\n\n".join(parts)


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="Write the tables of docs/configuration.md.")
    parser.add_argument("--check", action="store_true", help="only say whether the page is up to date")
    args = parser.parse_args(argv)
    return update(PAGE, BEGIN, END, render(), check=args.check)


if __name__ == "__main__":
    sys.exit(main())
