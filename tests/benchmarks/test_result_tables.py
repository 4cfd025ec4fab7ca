# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The tables of the pages are what the committed results say."""

import json

from benchmarks import result_tables


def test_the_pages_have_the_committed_results(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["result_tables", "--check"])
    assert result_tables.main() == 0, capsys.readouterr().err


def test_a_changed_result_is_found(tmp_path, monkeypatch, capsys):
    """For each file of results. A file that is missing is found as well, so its table cannot stay."""
    there = [path for _, path, _ in result_tables.TABLES if (result_tables.DOCS / path).exists()]
    docs = tmp_path / "docs"  # pages may be beside it
    for page in {page for page, *_ in result_tables.TABLES}:
        for name in (page, *there):
            target = docs / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((result_tables.DOCS / name).read_bytes())
    monkeypatch.setattr(result_tables, "DOCS", docs)
    monkeypatch.setattr("sys.argv", ["result_tables", "--check"])
    assert result_tables.main() == 0
    for path in there:
        text = (docs / path).read_text()
        results = json.loads(text)
        (docs / path).write_text(json.dumps(_with_other_numbers(results)))
        assert result_tables.main() == 1, path
        assert "make docs" in capsys.readouterr().err
        (docs / path).unlink()
        assert result_tables.main() == 1, path
        (docs / path).write_text(text)


def _with_other_numbers(value):
    """The same structure with every number that is not whole halved."""
    if isinstance(value, dict):
        return {key: _with_other_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_other_numbers(item) for item in value]
    return value / 2 if isinstance(value, float) else value
