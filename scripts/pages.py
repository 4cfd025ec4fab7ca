# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Update of the generated part of a page, between two marks. The rest is written by hand."""

import sys
from pathlib import Path


def page_with(text: str, begin: str, end: str, part: str) -> str:
    """Replace the part between the marks of a page.

    Raises:
        ValueError: when a mark is missing.
    """
    if begin not in text or end not in text:
        raise ValueError(f"The page must hold both marks: {begin} and {end}.")
    return f"{text.partition(begin)[0]}{begin}\n\n{part}\n\n{end}{text.partition(end)[2]}"


def update(page: Path, begin: str, end: str, part: str, *, check: bool) -> int:
    """Write the part into the page, or with `check` only compare. Returns 1 if `check` finds a difference, else 0."""
    text = page.read_text(encoding="utf-8")
    new = page_with(text, begin, end, part)
    if check:
        if new != text:
            sys.stderr.write(f"{page} is out of date. Run `make docs`.\n")
        return int(new != text)
    page.write_text(new, encoding="utf-8")
    return 0
