# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Files with the results of benchmarks and tests."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any


def add_result(path: Path, measured: dict[str, Any]) -> None:
    """Add one measurement to the list in a JSON file. The file is created if needed."""
    results = json.loads(path.read_text()) if path.exists() else []
    write_json(path, [*results, measured])


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically: a reader finds the old file or the new one, never a part."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    partial.replace(path)


def read_results(path: Path) -> list[dict[str, Any]]:
    """Read the measurements of `add_result`, or the tests of a JUnit file. Empty if there is no file.

    A test has a `test`, `seconds`, an `outcome` (`"passed"`, `"failed"` or `"skipped"`), a `message`, and `errors`:
    the error and the bound for each NAME that it recorded as the properties `error:NAME` and `bound:NAME`.
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
            outcome, message = name, _message(found)
    module = case.attrib["classname"].rpartition(".")[2]
    return {
        "test": f"{module}::{case.attrib['name']}",
        "seconds": float(case.attrib["time"]),
        "outcome": outcome,
        "message": message,
        "errors": errors,
    }


def _message(found: ElementTree.Element) -> str:
    """The first line of a message and the last line of its error, without the process output between them."""
    first = found.attrib.get("message", "").split("\n", 1)[0]
    errors = [line[1:].strip() for line in (found.text or "").splitlines() if line.startswith("E ")]
    last = errors[-1] if errors else ""
    return (first if last in first else f"{first} {last}")[:500]
