# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""An extension of griffe for the API reference: converts TRL's docstring notation to the Google style."""

import re
from typing import Any

import griffe

_LINK = re.compile(r"\[`~?([\w.]+)`\]")
_TYPE = re.compile(r"^(\s+\w+ )\((.*`.*)\):$", re.MULTILINE)
_EXAMPLE = re.compile(r"^(\s*)Example:$", re.MULTILINE)


class TrlDocstrings(griffe.Extension):
    """Types without backticks, references such as [`~trl.GRPOTrainer`] as code, and `Example:` as a section."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of an object after it is loaded."""
        if obj.docstring is None:
            return
        text = _LINK.sub(r"`\1`", obj.docstring.value)
        text = _TYPE.sub(
            lambda match: f"{match[1]}({match[2].replace('`', '').replace('*optional*', 'optional')}):", text
        )
        obj.docstring.value = _EXAMPLE.sub(r"\1Examples:", text)
