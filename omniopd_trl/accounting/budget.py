# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Budget of a run in tokens and dollars. A request is sent only if its worst case fits."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from omniopd_trl.accounting.pricing import Price
from omniopd_trl.accounting.usage import NO_LEDGER, Ledger, Usage
from omniopd_trl.errors import RESUME, BudgetError, ConfigError, WarnOnce


class Reservation:
    """The worst case of a request in flight. It ends once: settled, forfeited or released.

    Attributes:
        tokens: prompt and completion tokens that are reserved. 0 after the end.
        usd: dollars that are reserved. 0 after the end.
    """

    def __init__(self, budget: "Budget", tokens: int, usd: float):
        self._budget = budget
        self.tokens = tokens
        self.usd = usd
        self.ended = False

    def settle(self, usage: Usage) -> None:
        """Replace the worst case by the actual usage of the request.

        Raises:
            RuntimeError: when it was settled or forfeited before. The request would be counted twice.
        """
        if self.ended:
            raise RuntimeError("This reservation has already ended, and its usage would count twice. Settle it once.")
        cost = self._budget.add(usage)
        self._budget.compare_with_worst_case(usage.prompt_tokens + usage.completion_tokens, cost, self)
        self._end()

    def forfeit(self) -> None:
        """Count the worst case as spent, since the actual charge is unknown. Does nothing after the end."""
        self._budget.forfeited_tokens += self.tokens
        self._budget.forfeited_usd += self.usd
        self._end()

    def take(self, tokens: int, usd: float) -> "Reservation":
        """Move the worst case of one request of a batch to a reservation of its own, which is then settled at once."""
        self.tokens -= tokens
        self.usd = max(self.usd - usd, 0.0)
        return Reservation(self._budget, tokens, usd)

    def _end(self) -> None:
        self.tokens, self.usd, self.ended = 0, 0.0, True


class Budget:
    """Counts tokens and dollars, and delays or refuses requests that might exceed a limit.

    The amount spent plus the worst case of all requests in flight always stays within the limits. The limits are
    therefore kept, unless a request uses more than its worst case. Requests are admitted in order of arrival: a large
    request waits until it fits, and smaller requests behind it wait too. A budget serves one event loop at a time.

    Args:
        max_usd: dollars that the job may spend. Needs a `price`. `None` for no limit.
        max_tokens: prompt and completion tokens that the job may use, cached ones included. `None` for no limit.
        price: price of the teacher. `None` if it is not known: only tokens are counted then.
        spent: tokens that earlier runs of the same job used, summed over all processes.
        spent_usd: dollars that earlier runs of the same job paid, summed over all processes.
        num_processes: processes that share the limits. Each may spend an equal share of the remaining budget. The
            shares never add up to more than the remaining budget.

    Attributes:
        ledger: its `in_flight` is called with the peak in-flight cost since the queue was last empty, before a
            request is admitted. Requests outside audits, such as a probe's, are included.
        usd_before: dollars that earlier runs of the same job have spent.
        tokens_before: tokens that earlier runs of the same job have spent.

    Raises:
        BudgetError: when there is a limit in dollars and the price is not known.
        ConfigError: when a limit is not a finite number above 0, or `num_processes` is below 1.
    """

    def __init__(
        self,
        max_usd: float | None = None,
        max_tokens: int | None = None,
        price: Price | None = None,
        spent: Usage | None = None,
        spent_usd: float = 0.0,
        *,
        num_processes: int = 1,
    ):
        for name, limit in (("teacher_budget_usd", max_usd), ("teacher_budget_tokens", max_tokens)):
            if limit is not None and not 0 < limit < float("inf"):  # NaN is no limit either
                raise ConfigError(f"{name}={limit} must be above 0, and finite. Leave it out for no limit.")
        if num_processes < 1:
            raise ConfigError(f"num_processes={num_processes} must be at least 1: the budget is divided by it.")
        if max_usd is not None and price is None:
            raise BudgetError(
                f"teacher_budget_usd={max_usd} cannot be kept: the price of the teacher is not known. Give it in the "
                "recipe (`teacher_input_price` and `teacher_output_price`, dollars per million tokens), or set "
                "`teacher_budget_tokens` instead."
            )
        self.max_usd = max_usd
        self.max_tokens = max_tokens
        self.price = price
        self.used = spent or Usage()
        self.used_usd = spent_usd
        self.forfeited_tokens, self.forfeited_usd = 0, 0.0  # possibly charged requests, not part of `used`
        self.num_processes = num_processes
        # The limits of this process. The remaining budget is divided, rounded down. A deficit is not divided.
        self.tokens_before = before = self.tokens_spent
        self.usd_before = before_usd = self.usd_spent
        self._token_limit = None if max_tokens is None else before + max(max_tokens - before, 0) // num_processes
        self._usd_limit = max_usd
        if max_usd is not None and num_processes > 1:
            self._usd_limit = before_usd + max(max_usd - before_usd, 0.0) / num_processes
        self._warn_once = WarnOnce(__name__)
        self.ledger = NO_LEDGER
        self._peak = (0, 0.0)
        self._open: set[Reservation] = set()
        self._queue: deque[tuple[Reservation, asyncio.Future[None]]] = deque()

    def add(self, usage: Usage) -> float:
        """Count the usage of one request, and return its cost in dollars (0 without a price)."""
        cost = 0.0 if self.price is None else self.price.cost(usage)
        self.used = self.used + usage
        self.used_usd += cost
        return cost

    def compare_with_worst_case(self, tokens: int, usd: float, worst: Reservation) -> None:
        """Warn once when a request used more than its worst case. The limits may be exceeded by the difference."""
        if tokens > worst.tokens or usd > worst.usd * (1 + 1e-9):
            self._warn_once(
                f"A request of the teacher used {tokens} tokens ({usd:.6f} dollars), and its worst case was "
                f"{worst.tokens} ({worst.usd:.6f}): the service ignores `max_tokens` or counts prompt tokens "
                "differently. The full usage is counted, and the budget may be exceeded by the difference.",
                "overrun",
            )

    @asynccontextmanager
    async def reserve(
        self, prompt_tokens: int, completion_tokens: int, ledger: Ledger = NO_LEDGER
    ) -> AsyncIterator[Reservation]:
        """Reserve the worst case of one request until the block ends.

        A request counts as free if the block ends without `settle` or `forfeit`. A cancelled block counts at its worst
        case instead, since the request may have been sent. A cancellation while waiting costs nothing.

        Args:
            prompt_tokens: upper bound of the prompt's tokens.
            completion_tokens: upper bound of the tokens that the service may generate, over all samples.
            ledger: records the worst case of a cancelled request.

        Raises:
            BudgetError: when the request does not fit, even after all requests in flight have ended.
        """
        reservation = Reservation(self, *self.worst_case(prompt_tokens, completion_tokens))
        usd = reservation.usd
        await self._enter(reservation)
        try:
            yield reservation
        except asyncio.CancelledError:
            if not reservation.ended:
                reservation.forfeit()
                # Counted here, since no other code sees the cancellation.
                ledger.paid(Usage(prompt_tokens, 0, completion_tokens), None if self.price is None else usd)
            raise
        finally:
            # Without an `await`: a second cancellation must not prevent it.
            self.release(reservation)

    def worst_case(self, prompt_tokens: int, completion_tokens: int) -> tuple[int, float]:
        """Tokens and dollars (0 without a price) that a request of at most this size may use."""
        usd = 0.0 if self.price is None else self.price.worst_cost(prompt_tokens, completion_tokens)
        return prompt_tokens + completion_tokens, usd

    # ---- Batches ----

    def open_batch(self) -> Reservation:
        """A reservation without a request yet. `add_to_batch` adds them, and `release` ends it."""
        reservation = Reservation(self, 0, 0.0)
        self._open.add(reservation)
        return reservation

    def add_to_batch(self, batch: Reservation, tokens: int, usd: float, *, was_sent: bool = False) -> bool:
        """Reserve the worst case of one more request of a batch, if it fits.

        The journal's record of requests in flight is not changed: a batch outlives the process and has its own.

        Args:
            batch: a reservation from `open_batch`.
            tokens: tokens of the request, from `worst_case`.
            usd: its dollars.
            was_sent: whether an earlier process has sent it. It is reserved in any case then.

        Returns:
            Whether it is reserved. Otherwise it may fit when requests in flight have used less than their worst case.

        Raises:
            BudgetError: when it does not fit and nothing is in flight.
        """
        new = Reservation(self, tokens, usd)
        if not was_sent and not self._fits(new, self._open):
            if any(other.tokens for other in self._open):
                return False
            raise BudgetError(self._exhausted(new))
        batch.tokens += tokens
        batch.usd += usd
        return True

    def release(self, reservation: Reservation) -> None:
        """End a reservation. What was neither settled nor forfeited counts as free."""
        self._open.discard(reservation)
        self._admit()
        if not self._open:
            self._set_peak(0, 0.0)

    # ---- The queue ----

    async def _enter(self, reservation: Reservation) -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append((reservation, future))
        self._admit()
        try:
            await future
        except BaseException:
            # The request was cancelled while it waited, or just after it was admitted.
            if future.done() and not future.cancelled():
                future.exception()  # marks a refusal as retrieved, or asyncio would log it
            self._queue = deque(entry for entry in self._queue if entry[0] is not reservation)
            self.release(reservation)
            raise

    def _admit(self) -> None:
        """Admit requests from the front of the queue as long as they fit."""
        while self._queue:
            reservation, future = self._queue[0]
            if not future.done():
                if self._fits(reservation, self._open):
                    held = [reservation, *self._open]
                    tokens, usd = sum(r.tokens for r in held), sum(r.usd for r in held)
                    try:
                        self._set_peak(max(tokens, self._peak[0]), max(usd, self._peak[1]))
                    except Exception as error:  # belongs to the waiting request, not to the one that ended
                        future.set_exception(error)
                    else:
                        self._open.add(reservation)
                        future.set_result(None)
                elif self._open and self._fits(reservation, ()):
                    return  # requests in flight may use less than their worst case
                else:
                    future.set_exception(BudgetError(self._exhausted(reservation)))
            self._queue.popleft()

    def _set_peak(self, tokens: int, usd: float) -> None:
        if (tokens, usd) != self._peak:
            self.ledger.in_flight(tokens, None if self.price is None else usd)
            self._peak = tokens, usd

    def _fits(self, new: Reservation, others: "set[Reservation] | tuple[()]") -> bool:
        limit = self._token_limit
        if limit is not None and self.tokens_spent + new.tokens + sum(r.tokens for r in others) > limit:
            return False
        usd_limit = self._usd_limit
        return usd_limit is None or self.usd_spent + new.usd + sum(r.usd for r in others) <= usd_limit

    @property
    def num_in_flight(self) -> int:
        """Requests of this process in flight."""
        return len(self._open)

    @property
    def tokens_spent(self) -> int:
        """Tokens that count against the limit."""
        return self.used.prompt_tokens + self.used.completion_tokens + self.forfeited_tokens

    @property
    def usd_spent(self) -> float:
        """Dollars that count against the limit."""
        return self.used_usd + self.forfeited_usd

    def _exhausted(self, reservation: Reservation) -> str:
        spent = []
        if self.max_usd is not None:
            spent.append(
                f"{self.usd_spent:.4f} of teacher_budget_usd={self.max_usd} dollars are spent, and the next request "
                f"may cost {reservation.usd:.4f}"
            )
        if self.max_tokens is not None:
            spent.append(
                f"{self.tokens_spent} of teacher_budget_tokens={self.max_tokens} tokens are spent, and the next "
                f"request may use {reservation.tokens}"
            )
        share = ""
        if self.num_processes > 1:
            share = f" Each of {self.num_processes} processes may spend an equal share of the remaining budget."
        again = RESUME if self.tokens_spent else "start the command again"  # there is nothing to resume from
        return f"The budget is used up: {'; '.join(spent)}.{share} Raise the budget and {again}."
