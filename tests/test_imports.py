# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Imports go one way: errors <- math <- audits <- trainer <- command line; teachers and math never meet."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import omniopd_trl

PACKAGE = Path(omniopd_trl.__file__).parent

# The layer of each module or folder. A new module has to be put into one.
LAYERS = {
    "omniopd_trl": "root",
    "omniopd_trl.errors": "errors",
    "omniopd_trl.entropy": "math",
    "omniopd_trl.chunks": "math",
    "omniopd_trl.similarity": "math",
    "omniopd_trl.posterior": "math",
    "omniopd_trl.loss": "math",
    "omniopd_trl.teachers": "teachers",
    "omniopd_trl.data": "data",
    "omniopd_trl.evaluation": "data",
    "omniopd_trl.checkpoints": "data",
    "omniopd_trl.audit": "audit",
    "omniopd_trl.journal": "journal",
    "omniopd_trl.replay": "journal",
    "omniopd_trl.recorder": "journal",
    "omniopd_trl.lm_head": "head",
    "omniopd_trl.offload": "head",
    "omniopd_trl.credentials": "config",
    "omniopd_trl.omniopd_config": "config",
    "omniopd_trl.agreement": "trainer",
    "omniopd_trl.construction": "trainer",
    "omniopd_trl.fingerprint": "trainer",
    "omniopd_trl.generation": "trainer",
    "omniopd_trl.metrics": "trainer",
    "omniopd_trl.micro_batches": "trainer",
    "omniopd_trl.omniopd_trainer": "trainer",
    "omniopd_trl.order": "trainer",
    "omniopd_trl.pending": "trainer",
    "omniopd_trl.posterior_average": "trainer",
    "omniopd_trl.reference": "trainer",
    "omniopd_trl.rewards": "trainer",
    "omniopd_trl.cost": "cost",
    "omniopd_trl.processes": "processes",
    "omniopd_trl.launch": "command",
    "omniopd_trl.train": "command",
    "omniopd_trl.cli": "command",
    "omniopd_trl.demo": "demo",
}

# What each layer may import of this package, besides itself.
ALLOWED = {
    "root": set(),
    "errors": set(),
    "math": {"errors"},
    "teachers": {"errors"},
    "data": {"errors"},
    "audit": {"errors", "math", "teachers"},
    "journal": {"errors", "math", "teachers", "audit"},
    "head": {"errors", "math"},
    "config": {"errors", "math"},
    "trainer": {"errors", "math", "teachers", "data", "audit", "journal", "head", "config", "processes"},
    "cost": {"errors", "teachers"},
    "processes": set(),
    "command": {"errors", "teachers", "data", "audit", "cost", "config", "trainer", "processes"},
    "demo": {"errors"},
}

# What each layer must not import from elsewhere. The equations must stay readable and testable without a model; of the
# host's trainers only the layers around the trainer know.
HEAVY = {"accelerate", "datasets", "peft", "transformers", "trl"}
FORBIDDEN = {
    "root": {*HEAVY, "torch"},
    "errors": {*HEAVY, "torch"},
    "math": HEAVY,
    "teachers": {"trl", "accelerate", "datasets", "peft"},
    "data": {"trl", "accelerate", "peft"},
    "audit": HEAVY,
    "journal": HEAVY,
    "cost": HEAVY,
    "processes": {*HEAVY, "torch"},
    "demo": {"trl"},
}


def layer_of(module):
    """The layer of a module: its own entry, or that of the folder it is in; None where there is none."""
    while module not in LAYERS and "." in module:
        module = module.rpartition(".")[0]
    return LAYERS.get(module) if module != "omniopd_trl" else "root"


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
    if layer is None or (layer == "root" and module != "omniopd_trl"):
        yield f"{module} is in no layer: add it to LAYERS in {Path(__file__).name}"
        return
    for name in imports_of(ast.parse(source)):
        top = name.partition(".")[0]
        if top == "omniopd_trl":
            other = layer_of(name)
            if other not in {layer, *ALLOWED[layer]}:
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
        ("omniopd_trl.loss", "import trl", "omniopd_trl.loss (math) imports trl"),
        ("omniopd_trl.loss", "def f():\n    from transformers.utils import logging", "imports transformers"),
        ("omniopd_trl.loss", "from omniopd_trl.audit import Audit", "imports omniopd_trl.audit.Audit (audit)"),
        ("omniopd_trl.teachers.local", "from omniopd_trl import chunks", "imports omniopd_trl.chunks (math)"),
        ("omniopd_trl.chunks", "from omniopd_trl.teachers.base import Teacher", "imports omniopd_trl.teachers"),
        ("omniopd_trl.audit", "import omniopd_trl.omniopd_trainer", "(trainer)"),
        ("omniopd_trl.new", "import torch", "omniopd_trl.new is in no layer"),
    ],
)
def test_direction_is_enforced(module, source, problem):
    """The check itself sees what it is there to see."""
    (found,) = problems_of(module, source)
    assert problem in found


def test_types_only_imports_pass():
    """An import for type checkers is no import."""
    assert not list(problems_of("omniopd_trl.loss", "if TYPE_CHECKING:\n    import trl"))


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import omniopd_trl", {*HEAVY, "torch"}),
        ("import omniopd_trl.teachers", {*HEAVY, "torch"}),
        ("from omniopd_trl import entropy, chunks, similarity, posterior, loss", HEAVY),
        ("import omniopd_trl.audit", HEAVY),
        ("import omniopd_trl.data, omniopd_trl.evaluation", {"trl"}),
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
