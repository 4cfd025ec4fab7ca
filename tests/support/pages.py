# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""What tests do with a page in a browser."""

import time


def until(condition):
    """The first true value of a condition that changes within seconds."""
    deadline = time.monotonic() + 20
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not change in time"
        time.sleep(0.02)
    return found


def open_page(browser, address):
    """Open a page of the report and wait for its script."""
    browser.get("about:blank")
    browser.get(address)
    until(lambda: browser.execute_script("return document.documentElement.dataset.ready"))
    return browser


def texts(browser, selector):
    return browser.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map((element) => element.textContent)", selector
    )


def put(browser, name, value):
    """Write a value into a filter."""
    browser.execute_script(
        "const e = document.getElementById(arguments[0]); e.value = arguments[1]; "
        "e.dispatchEvent(new Event('input', {bubbles: true}));",
        name,
        value,
    )
