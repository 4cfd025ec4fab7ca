# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""A real browser for the tests of the page. They are skipped where there is none."""

import pytest

from scripts.chromium import BROWSER, DRIVER, chromium


@pytest.fixture(scope="session")
def browser():
    """Headless Chromium, which logs errors and requests."""
    pytest.importorskip("selenium.webdriver", reason="needs selenium")
    if not (BROWSER and DRIVER):
        pytest.skip("needs Chromium and its driver")
    with chromium(**{"goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}) as driver:
        yield driver
