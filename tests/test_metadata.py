# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The package's metadata says what is tested."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent


# Not dependencies: what an import of them is preceded by a check of, an extra's or that of `report_to`.
CHECKED_FIRST = {"math_verify", "matplotlib", "trackio", "wandb"}


def test_imports_are_declared():
    """The package imports no other package that only happens to come with a dependency."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    declared = {re.match(r"[\w-]+", line)[0].replace("-", "_") for line in project["dependencies"]}
    imported = set()
    for path in (ROOT / "omniopd_trl").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [name.name for name in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            imported |= {name.partition(".")[0].replace("yaml", "pyyaml") for name in names}
    assert imported - sys.stdlib_module_names - CHECKED_FIRST - {"omniopd_trl"} == declared


def test_python_versions():
    """The versions that the metadata names are those that the workflow runs; pip installs on no older one."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    pattern = r"Programming Language :: Python :: (3\.\d+)"
    named = [match[1] for name in project["classifiers"] if (match := re.fullmatch(pattern, name))]
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text("utf-8"))["jobs"]
    tested = set()
    for job in jobs.values():
        matrix = job.get("strategy", {}).get("matrix", {})
        for step in job["steps"]:
            version = step.get("with", {}).get("python-version")
            tested |= set(matrix["python-version"]) if "matrix" in str(version) else {version} - {None}
    assert tested == set(named)
    assert project["requires-python"] == f">={named[0]}"
