# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Imports have one direction: a folder of the package imports from the folders before it only."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import omniopd_trl

PACKAGE = Path(omniopd_trl.__file__).parent

# Each layer is a folder, or a file beside them, and imports from those before it.
ORDER = "errors, method, accounting, models, data, teachers, audits, journal, evals, report, trainer, baselines, cli"
LAYERS = ORDER.split(", ")
# A report reads what runs have written, and needs no model for it.
EXCEPT = {"report": {"models"}}

# What each layer must not import from elsewhere. The equations must stay readable and testable without a model; of the
# host's trainers only the layers around the trainer know.
HEAVY = {"accelerate", "datasets", "peft", "transformers", "trl"}
FORBIDDEN = {
    "root": {*HEAVY, "torch"},
    "errors": {*HEAVY, "torch"},
    "method": HEAVY,
    "accounting": {"torch", "trl", "accelerate", "datasets", "peft"},
    "data": {"trl", "accelerate", "peft"},
    "teachers": {"trl", "accelerate", "datasets", "peft"},
    "audits": HEAVY,
    "evals": {"accelerate", "peft"},
    "journal": HEAVY,
    "report": {*HEAVY, "torch"},
    "demo": {"trl"},
}


def layer_of(module):
    """The layer of a module: the folder that it is in. `train.py` stands for the command that it runs."""
    parts = module.split(".")
    return {"train": "cli"}.get(parts[1], parts[1]) if len(parts) > 1 else "root"


def allowed(layer):
    """The layers that one may import. The demo is apart: it imports errors, and commands and teachers import it."""
    if layer in LAYERS:
        own = {*LAYERS[: LAYERS.index(layer) + 1]} - EXCEPT.get(layer, set())
        # The root has nothing but names that are imported on first use, and the version.
        return own | {"root"} | ({"demo"} if layer in ("cli", "teachers") else set())
    return {"errors", layer} if layer == "demo" else set()


def imports_of(tree):
    """Every import, also inside functions; those for type checkers only are left out."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            # `from package import module` names a module, or something in the package.
            yield from (f"{node.module}.{name.name}" for name in node.names)


def problems_of(module, source):
    """What a module imports against the direction, in words."""
    layer = layer_of(module)
    if layer not in {*LAYERS, "root", "demo"}:
        yield f"{module} is in no layer: move it into a folder of {PACKAGE.name}, or add its folder to ORDER"
        return
    for name in imports_of(ast.parse(source)):
        top = name.partition(".")[0]
        if top == "omniopd_trl":
            other = layer_of(name)
            if other not in allowed(layer):
                yield f"{module} ({layer}) imports {name} ({other})"
        elif top in FORBIDDEN.get(layer, ()):
            yield f"{module} ({layer}) imports {name}"


def module_name(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=module_name)
def test_direction(path):
    """No module imports one that is built on it."""
    assert not list(problems_of(module_name(path), path.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    ("module", "source", "problem"),
    [
        ("omniopd_trl.method.loss", "import trl", "omniopd_trl.method.loss (method) imports trl"),
        ("omniopd_trl.method.loss", "def f():\n    from transformers.utils import logging", "imports transformers"),
        ("omniopd_trl.method.loss", "from omniopd_trl.audits.types import Audit", "imports omniopd_trl.audits.types"),
        ("omniopd_trl.teachers.local", "from omniopd_trl import journal", "imports omniopd_trl.journal (journal)"),
        ("omniopd_trl.teachers.remote.engine", "from omniopd_trl.audits import types", "(teachers) imports"),
        ("omniopd_trl.method.chunks", "from omniopd_trl.teachers.base import Teacher", "imports omniopd_trl.teachers"),
        ("omniopd_trl.accounting.budget", "import torch", "(accounting) imports torch"),
        ("omniopd_trl.audits.auditor", "import omniopd_trl.trainer.omniopd_trainer", "(trainer)"),
        ("omniopd_trl.report.table", "from omniopd_trl.models import lm_head", "imports omniopd_trl.models"),
        ("omniopd_trl.trainer.metrics", "from omniopd_trl.demo import asset_path", "(demo)"),
        ("omniopd_trl.demo.world", "from omniopd_trl.method import loss", "(method)"),
        ("omniopd_trl.new", "import torch", "omniopd_trl.new is in no layer"),
        ("omniopd_trl.new.part", "import torch", "omniopd_trl.new.part is in no layer"),
    ],
)
def test_direction_is_enforced(module, source, problem):
    """The check itself sees what it is there to see."""
    (found,) = problems_of(module, source)
    assert problem in found


def circle_in(sources):
    """Modules that import each other in a circle, given the source of each; empty without one."""
    graph = {}
    for module, source in sources.items():
        # `from package.module import name` names a module, or what is in `package.module`.
        names = [name if name in sources else name.rpartition(".")[0] for name in imports_of(ast.parse(source))]
        graph[module] = {*names} & {*sources} - {module}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_no_circles():
    """No two modules need each other, also not by imports inside functions."""
    assert circle_in({module_name(path): path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}) == []


def test_circles_are_found():
    """Through several modules, and an import inside a function."""
    sources = {"a.b": "from a.c import f", "a.c": "def f():\n    from a import d", "a.d": "import a.b"}
    assert {*circle_in(sources)} == {*sources}
    assert circle_in({**sources, "a.d": "if TYPE_CHECKING:\n    import a.b"}) == []


def test_types_only_imports_pass():
    """An import for type checkers is no import."""
    assert not list(problems_of("omniopd_trl.method.loss", "if TYPE_CHECKING:\n    import trl"))


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import omniopd_trl", {*HEAVY, "torch"}),
        ("import omniopd_trl.teachers", {*HEAVY, "torch"}),
        ("import omniopd_trl.train, omniopd_trl.cli.main, omniopd_trl.cli.launch", {*HEAVY, "torch"}),
        ("import omniopd_trl.accounting.budget, omniopd_trl.accounting.forecast", {*HEAVY, "torch"}),
        ("import omniopd_trl.journal.reader", {*HEAVY, "torch"}),
        ("import omniopd_trl.method", HEAVY),
        ("import omniopd_trl.audits.auditor", HEAVY),
        ("import omniopd_trl.journal.store", HEAVY),
        ("import omniopd_trl.data, omniopd_trl.evals", {"trl"}),
    ],
)
def test_imports_stay_light(statement, absent):
    """What an import really loads, in a process of its own."""
    code = f"import sys; {statement}; print(*sorted({absent!r} & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert loaded.stdout.split() == []


def test_public_names():
    """Every public name resolves, shows in `dir`, and a name that does not exist is an AttributeError."""
    assert omniopd_trl.__all__ == ["OmniOPDConfig", "OmniOPDTrainer", "__version__"]
    for name in omniopd_trl.__all__:
        assert getattr(omniopd_trl, name) is not None
        assert name in dir(omniopd_trl)
    with pytest.raises(AttributeError, match="OmniOPD"):
        omniopd_trl.OmniOPD  # noqa: B018
