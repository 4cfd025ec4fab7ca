# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Servers on this machine that speak the providers' wire formats, and fail when they are told to."""

from tests.support.loopback.server import Fault, Loopback, Recorded
from tests.support.loopback.wire import anthropic, gemini, openai

__all__ = ["Fault", "Loopback", "Recorded", "anthropic", "gemini", "openai"]
