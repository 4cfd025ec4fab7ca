# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Names and types of the options, read from the source files of the installed packages.

A mistyped key is refused in less than a second (an import of TRL takes many), and the check always matches the
installed versions.
"""

import ast
import importlib
import importlib.util
import re
import typing
from collections.abc import Iterable
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

# The dataclasses of the parser and their base classes, with the package and file of each.
_FILES = {
    "OmniOPDScriptArguments": ("omniopd_trl", "cli/recipe.py"),
    "ScriptArguments": ("trl", "scripts/utils.py"),
    "OmniOPDConfig": ("omniopd_trl", "trainer/omniopd_config.py"),
    "DistillationConfig": ("trl", "trainer/distillation_config.py"),
    "_BaseConfig": ("trl", "trainer/base_config.py"),
    "TrainingArguments": ("transformers", "training_args.py"),
    "ModelConfig": ("trl", "trainer/model_config.py"),
    "DatasetMixtureConfig": ("trl", "scripts/utils.py"),
    "SFTConfig": ("trl", "trainer/sft_config.py"),
    "GRPOConfig": ("trl", "trainer/grpo_config.py"),
}
_PARSED = ("OmniOPDScriptArguments", "OmniOPDConfig", "ModelConfig", "DatasetMixtureConfig")

# The baselines, which have a section of options each, and TRL's configuration of each.
SECTIONS = {"sft": "SFTConfig", "opd": "DistillationConfig", "grpo": "GRPOConfig"}


class _SourceChanged(Exception):
    """A file of an installed package has an unexpected form."""


@cache
def option_hints() -> dict[str, Any]:
    """The type of each option of a recipe, by name."""
    hints: dict[str, Any] = {}
    for name in _PARSED:
        hints |= _hints_of_class(name)
    # Declared as a string, but the Trainer and this command also accept `true`.
    return hints | {"resume_from_checkpoint": str | bool | None}


@cache
def section_hints(name: str) -> dict[str, Any]:
    """The type of each option of a baseline's section."""
    return _hints_of_class(SECTIONS[name])


def hints_of(dataclass_types: Iterable[type]) -> dict[str, Any]:
    """The type of each option of dataclasses, by name."""
    hints: dict[str, Any] = {}
    for dataclass_type in dataclass_types:
        own = typing.get_type_hints(dataclass_type)
        hints.update({item.name: own[item.name] for item in fields(dataclass_type) if item.init})
    return hints


def package_tree(package: str, file: str) -> ast.Module:
    """The syntax tree of a file of an installed package, without importing it.

    Raises:
        _SourceChanged: when there is no such file.
    """
    spec = importlib.util.find_spec(package)
    folders = (spec.submodule_search_locations if spec is not None else None) or []
    for folder in folders:
        path = Path(folder) / file
        if path.is_file():
            return ast.parse(path.read_text(encoding="utf-8"))
    raise _SourceChanged(f"{package}/{file}")


def _hints_of_class(name: str) -> dict[str, Any]:
    """The types of the fields of a dataclass and its base classes.

    A class whose source has an unexpected form (a newer version) is imported, which takes some seconds.
    """
    if name not in _FILES:
        raise _SourceChanged(name)
    try:
        return _hints_in_source(name)
    except _SourceChanged:
        dataclass_type = getattr(importlib.import_module(_FILES[name][0]), name, None)
        if dataclass_type is None:
            raise
        return hints_of([dataclass_type])


def _hints_in_source(name: str) -> dict[str, Any]:
    node = next((n for n in package_tree(*_FILES[name]).body if isinstance(n, ast.ClassDef) and n.name == name), None)
    if node is None:
        raise _SourceChanged(name)
    hints: dict[str, Any] = {}
    for base in node.bases:
        hints |= _hints_of_class(ast.unparse(base))
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and not _is_no_option(item):
            hints[item.target.id] = _evaluate(item.annotation)
    return hints


def _is_no_option(item: ast.AnnAssign) -> bool:
    return ast.unparse(item.annotation).startswith(("ClassVar", "typing.ClassVar")) or (
        isinstance(item.value, ast.Call)
        and any(k.arg == "init" and ast.unparse(k.value) == "False" for k in item.value.keywords)
    )


class _Names(dict[str, Any]):
    """The names in annotations. Any other class, such as an enumeration, is represented by a subclass of `str`."""

    def __missing__(self, name: str) -> type:
        return type(name, (str,), {"__module__": ""})


def _evaluate(annotation: ast.expr) -> Any:
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        annotation = ast.parse(annotation.value, mode="eval").body
    plain: dict[str, Any] = {kind.__name__: kind for kind in (str, int, float, bool, list, dict, tuple, set)}
    names = _Names(plain | {name: getattr(typing, name) for name in ("Any", "Optional", "Union", "Literal")})
    code = compile(ast.Expression(annotation), "<annotation>", "eval")
    try:
        return eval(code, {"__builtins__": {}}, names)
    except (TypeError, AttributeError) as error:
        raise _SourceChanged(ast.unparse(annotation)) from error


def describe_type(hint: Any) -> str:
    """A type as written in source code, without module names."""
    text = hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
    return re.sub(r"(?:\w+\.|(?<![\w.])\.)+(?=\w)", "", text)
