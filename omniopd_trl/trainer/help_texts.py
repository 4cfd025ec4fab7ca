# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The help texts of options, which are their descriptions in the docstring of the dataclass."""

import inspect
import re
from collections.abc import Iterator
from dataclasses import field
from typing import NamedTuple, TypeVar

T = TypeVar("T")

# A title of a group, or the name and the description of an option.
_ENTRY = re.compile(r"^    (?:> (?P<group>.+)|(?P<name>\w+) \(`.*\):\n(?P<text>(?: {8}.+\n?)+))", re.MULTILINE)
_LINK = re.compile(r"\[`~?(?:\w+\.)*(\w+)`\]")


class Entry(NamedTuple):
    """An option in the docstring of its dataclass."""

    group: str  # the last title before it; empty without one
    name: str
    text: str


def entries_of(config: type) -> Iterator[Entry]:
    """The options in the docstring of a dataclass, in order; none with `python -OO`, which removes it."""
    group = ""
    for match in _ENTRY.finditer(inspect.cleandoc(config.__doc__ or "")):
        group = match["group"] or group
        if match["name"]:
            yield Entry(group, match["name"], _LINK.sub(r"`\1`", " ".join(match["text"].split())))


def with_help(config: type[T]) -> type[T]:
    """Give the fields of a dataclass the help texts that the command line shows. Use it below `@dataclass`."""
    for _, name, text in entries_of(config):
        # argparse formats a help text with %.
        setattr(config, name, field(default=getattr(config, name), metadata={"help": text.replace("%", "%%")}))
    return config
