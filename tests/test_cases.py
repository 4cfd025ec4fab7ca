# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Each input that once failed has a test, and tests/CASES.md names it."""

from scripts import cases


def test_the_page_is_current():
    assert cases.PAGE.read_text("utf-8") == cases.page(), "run `python -m scripts.cases`"
