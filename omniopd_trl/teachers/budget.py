# Copyright 2026 The omniopd_trl Authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""What may still be spent, and what was. A request is sent only when its worst case fits."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from omniopd_trl.errors import BudgetError
from omniopd_trl.teachers.base import Usage


@dataclass(frozen=True)
class Price:
    """US dollars per million tokens.

    Attributes:
        input: prompt tokens that no cache served.
        output: completion tokens, hidden reasoning included.
        cache_read: prompt tokens that a cache served; `None` charges them as `input`.
        cache_write: prompt tokens that were written to a cache; `None` charges them as `input`. Used for worst cases.
    """

    input: float
    output: float
    cache_read: float | None = None
    cache_write: float | None = None

    def cost(self, usage: Usage) -> float:
        """Dollars for a usage."""
        cached = self.input if self.cache_read is None else self.cache_read
        uncached = usage.prompt_tokens - usage.cached_tokens
        return (uncached * self.input + usage.cached_tokens * cached + usage.completion_tokens * self.output) / 1e6

    def worst_cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        """The most that a request of this size can cost, in dollars."""
        highest = max(self.input, self.cache_read or 0.0, self.cache_write or 0.0)
        return (prompt_tokens * highest + completion_tokens * self.output) / 1e6


class Reservation:
    """The worst case of a request that is under way."""

    def __init__(self, budget: "Budget", tokens: int, usd: float):
        self._budget = budget
        self.tokens = tokens
        self.usd = usd

    def settle(self, usage: Usage) -> None:
        """Replace the worst case by what the request used."""
        self._budget.add(usage)
        self.tokens, self.usd = 0, 0.0

    def forfeit(self) -> None:
        """Count the worst case as spent: nobody knows what the service charged for."""
        self._budget.forfeited_tokens += self.tokens
        self._budget.forfeited_usd += self.usd
        self.tokens, self.usd = 0, 0.0


class Budget:
    """Counts tokens and dollars, and holds requests back that might exceed a limit.

    Args:
        max_usd: dollars that may be spent; needs a `price`. `None` for no limit.
        max_tokens: prompt and completion tokens that may be used. `None` for no limit.
        price: of the teacher; `None` when it is not known, and only tokens are counted.
        spent: what earlier runs of the same job used, and
        spent_usd: paid.
    """

    def __init__(
        self,
        max_usd: float | None = None,
        max_tokens: int | None = None,
        price: Price | None = None,
        spent: Usage | None = None,
        spent_usd: float = 0.0,
    ):
        if max_usd is not None and price is None:
            raise BudgetError(
                f"teacher_budget_usd={max_usd} cannot be kept: the price of the teacher is not known. Give it in the "
                "recipe, or set `teacher_budget_tokens` instead."
            )
        self.max_usd = max_usd
        self.max_tokens = max_tokens
        self.price = price
        self.used = spent or Usage()
        self.used_usd = spent_usd
        self.forfeited_tokens = 0  # worst cases of requests that may have been charged for, not part of `used`
        self.forfeited_usd = 0.0
        self._open: set[Reservation] = set()
        self._changed = asyncio.Condition()

    def add(self, usage: Usage) -> None:
        """Count what was used."""
        self.used = self.used + usage
        if self.price is not None:
            self.used_usd += self.price.cost(usage)

    @asynccontextmanager
    async def reserve(self, prompt_tokens: int, completion_tokens: int) -> AsyncIterator[Reservation]:
        """Hold the worst case of one request until it is settled; an unsettled request counts as free.

        Raises:
            BudgetError: when it does not fit, and nothing that is under way could make room.
        """
        usd = 0.0 if self.price is None else self.price.worst_cost(prompt_tokens, completion_tokens)
        reservation = Reservation(self, prompt_tokens + completion_tokens, usd)
        async with self._changed:
            while not self._fits(reservation):
                if not self._open:
                    raise BudgetError(self._exhausted())
                await self._changed.wait()
            self._open.add(reservation)
        try:
            yield reservation
        finally:
            async with self._changed:
                self._open.discard(reservation)
                self._changed.notify_all()

    def _fits(self, new: Reservation) -> bool:
        tokens = self.tokens_spent + new.tokens + sum(r.tokens for r in self._open)
        usd = self.usd_spent + new.usd + sum(r.usd for r in self._open)
        return (self.max_tokens is None or tokens <= self.max_tokens) and (self.max_usd is None or usd <= self.max_usd)

    @property
    def tokens_spent(self) -> int:
        """Tokens that count against the limit."""
        return self.used.prompt_tokens + self.used.completion_tokens + self.forfeited_tokens

    @property
    def usd_spent(self) -> float:
        """Dollars that count against the limit."""
        return self.used_usd + self.forfeited_usd

    def _exhausted(self) -> str:
        spent = []
        if self.max_usd is not None:
            spent.append(f"{self.usd_spent:.4f} of teacher_budget_usd={self.max_usd} dollars")
        if self.max_tokens is not None:
            spent.append(f"{self.tokens_spent} of teacher_budget_tokens={self.max_tokens} tokens")
        return (
            f"The budget is used up: {' and '.join(spent)} are spent, and the worst case of one more request does not "
            "fit. Raise the budget and resume from the last checkpoint."
        )
