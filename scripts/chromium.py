# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Headless Chromium, for screenshots, benchmarks and tests. Selenium, Chromium and its driver must be installed."""

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
ARGUMENTS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars")
SECONDS = 20  # in which a page must change


@contextmanager
def chromium(**capabilities: Any) -> Iterator[Any]:
    """A selenium driver of Chromium with these capabilities."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER or ""
    for argument in ARGUMENTS:
        options.add_argument(argument)
    for name, value in capabilities.items():
        options.set_capability(name, value)
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER)) as driver:
        yield driver


def until(condition: Callable[[], T]) -> T:
    """The first true value of a condition.

    Raises:
        TimeoutError: when it has none within `SECONDS`.
    """
    deadline = time.monotonic() + SECONDS
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"The page did not change within {SECONDS} s.")
        time.sleep(0.02)
    return found


def open_page(driver: Any, address: str) -> Any:
    """Open a report and wait for its script. Returns the driver."""
    driver.get("about:blank")  # otherwise another fragment of an open page does not load it again
    driver.get(address)
    until(lambda: driver.execute_script("return document.documentElement.dataset.ready"))
    return driver


def emulate(driver: Any, width: int, height: int, scale: float = 1.0) -> None:
    """Set the size of the window, in pixels of CSS. One below 500 is a phone."""
    size = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": width < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def use_theme(driver: Any, theme: str) -> None:
    """Prefer `"light"` or `"dark"` pages."""
    features = [{"name": "prefers-color-scheme", "value": theme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
