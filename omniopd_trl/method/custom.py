# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Checks of custom functions before they are called."""

import inspect
from collections.abc import Callable
from typing import Any


def why_not_called(function: Callable[..., Any], num_arguments: int) -> str:
    """Why a function cannot be called with so many arguments; empty if it can, or if its signature is unknown.

    Example:
        >>> why_not_called(lambda chunk: 1.0, 2)
        'too many positional arguments'
    """
    if any(map(inspect.iscoroutinefunction, (function, getattr(function, "__call__", None)))):  # noqa: B004
        return "it is asynchronous"
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some functions that are written in C have none
        return ""
    try:
        signature.bind(*[None] * num_arguments)
    except TypeError as error:
        return str(error)
    return ""
