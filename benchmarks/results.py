# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""What benchmarks and tests measured, in files that other commands read."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any


def add_result(path: Path, measured: dict[str, Any]) -> None:
    """Add one measurement to the list in a JSON file, which is made when it does not exist."""
    results = json.loads(path.read_text()) if path.exists() else []
    write_json(path, [*results, measured])


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file in one move: a reader finds the old file or the new one, never a part."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    partial.replace(path)


def read_results(path: Path) -> list[dict[str, Any]]:
    """Measurements that `add_result` wrote, or tests in a JUnit file; none when there is no file.

    A test has a `test`, `seconds`, an `outcome` (`"passed"`, `"failed"` or `"skipped"`), a `message`, and `errors`:
    both numbers for each name that it recorded as the properties `error:NAME` and `bound:NAME`.
    """
    if not path.exists():
        return []
    text = path.read_text()
    if not text.startswith("<"):
        results: list[dict[str, Any]] = json.loads(text)
        return results
    return [_test(case) for case in ElementTree.fromstring(text).iter("testcase")]


def _test(case: ElementTree.Element) -> dict[str, Any]:
    properties = {p.attrib["name"]: p.attrib["value"] for p in case.iter("property")}
    errors = {
        name.removeprefix("error:"): [float(value), float(properties[name.replace("error:", "bound:", 1)])]
        for name, value in properties.items()
        if name.startswith("error:")
    }
    outcome, message = "passed", ""
    for kind, name in (("skipped", "skipped"), ("failure", "failed"), ("error", "failed")):
        if (found := case.find(kind)) is not None:
            outcome, message = name, found.attrib.get("message", "")[:500]
    module = case.attrib["classname"].rpartition(".")[2]
    return {
        "test": f"{module}::{case.attrib['name']}",
        "seconds": float(case.attrib["time"]),
        "outcome": outcome,
        "message": message,
        "errors": errors,
    }
