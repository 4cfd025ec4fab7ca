# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Loopback servers with the wire formats of the providers and injected failures."""

from tests.support.loopback.server import Fault, Loopback, Recorded
from tests.support.loopback.wire import anthropic, gemini, openai

__all__ = ["Fault", "Loopback", "Recorded", "anthropic", "gemini", "openai"]
