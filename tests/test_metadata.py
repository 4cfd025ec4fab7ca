# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The package's metadata says what is tested."""

import re
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent


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
