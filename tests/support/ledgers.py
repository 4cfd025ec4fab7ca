# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""A ledger that keeps its calls in memory."""

from omniopd_trl.accounting.usage import Ledger, Usage


class MemoryLedger(Ledger):
    """A ledger that keeps its calls in memory.

    Attributes:
        payments: usage and dollars of each request.
        peaks: tokens and dollars of each new peak in flight.
    """

    def __init__(self) -> None:
        self.payments: list[tuple[Usage, float | None]] = []
        self.peaks: list[tuple[int, float | None]] = []

    def paid(self, usage: Usage, usd: float | None) -> None:
        self.payments.append((usage, usd))

    def in_flight(self, tokens: int, usd: float | None) -> None:
        self.peaks.append((tokens, usd))
