# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The budget is kept whatever requests do, in whatever order they end."""

import asyncio
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omniopd_trl.accounting.budget import Budget
from omniopd_trl.accounting.pricing import Price
from omniopd_trl.accounting.usage import NoLedger, Usage
from omniopd_trl.errors import BudgetError, ConfigError, TeacherError
from tests.support.ledgers import MemoryLedger

PRICE = Price(1.0, 5.0, 0.1, 1.25)
DOLLAR = Price(1e6, 1e6)  # a dollar a token, so dollars are counted as tokens are


async def turns(number=5):
    """Let every other task continue as far as it can."""
    for _ in range(number):
        await asyncio.sleep(0)


class Request:
    """A request of a worst case, which waits in the service until it is told how to end."""

    def __init__(self, budget, prompt, completion=0):
        self.budget, self.prompt, self.completion = budget, prompt, completion
        self.usage = asyncio.get_running_loop().create_future()
        self.sent = False
        self.task = asyncio.create_task(self.run())

    async def run(self):
        async with self.budget.reserve(self.prompt, self.completion) as reservation:
            self.sent = True
            usage = await self.usage
            if usage is not None:
                reservation.settle(usage)

    async def end(self, usage):
        self.usage.set_result(usage)
        await self.task
        await turns()


# What becomes of one request: its worst case, and how much of it is used.
ENDINGS = st.sampled_from(["settled", "settled", "settled", "forfeited", "free", "failed", "cancelled"])
REQUESTS = st.lists(
    st.tuples(st.integers(0, 40), st.integers(0, 40), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), ENDINGS),
    min_size=1,
    max_size=30,
)


class TestNeverExceeded:
    """The guarantee."""

    @settings(deadline=None)
    @given(
        REQUESTS,
        st.integers(1, 400),
        st.floats(1e-5, 1e-3),
        st.sampled_from(["tokens", "usd", "both"]),
        st.randoms(use_true_random=False),
    )
    def test_any_requests(self, requests, max_tokens, max_usd, limited, rng):
        """Concurrent requests that use at most their worst case never pass a limit, at any moment; counts add up."""
        budget = Budget(
            max_usd=None if limited == "tokens" else max_usd,
            max_tokens=None if limited == "usd" else max_tokens,
            price=PRICE,
        )
        billed = []  # what the service charges for, which the budget must never let pass the limits
        forfeited = []
        in_flight = set()
        refused = []

        def check():
            tokens = sum(u.prompt_tokens + u.completion_tokens for u in billed)
            usd = sum(PRICE.cost(u) for u in billed)
            # Whatever is in flight may turn out at its worst.
            tokens += sum(p + c for p, c in in_flight_sizes()) + sum(p + c for p, c in forfeited)
            usd += sum(PRICE.worst_cost(p, c) for p, c in [*in_flight_sizes(), *forfeited])
            assert budget.max_tokens is None or tokens <= budget.max_tokens
            assert budget.max_usd is None or usd <= budget.max_usd * (1 + 1e-9)

        def in_flight_sizes():
            return [size for _, size in in_flight]

        async def one(index, prompt, completion, used, cached, written, ending):
            for _ in range(rng.randrange(3)):
                await asyncio.sleep(0)
            key = (index, (prompt, completion))
            try:
                async with budget.reserve(prompt, completion) as reservation:
                    in_flight.add(key)
                    check()
                    for _ in range(rng.randrange(6)):
                        await asyncio.sleep(0)
                    in_flight.discard(key)
                    tokens = int(used * prompt)
                    usage = Usage(tokens, int(cached * tokens), int(written * completion))
                    if ending == "settled":
                        billed.append(usage)
                        reservation.settle(usage)
                    elif ending == "forfeited":
                        forfeited.append((prompt, completion))
                        reservation.forfeit()
                    elif ending == "cancelled":
                        forfeited.append((prompt, completion))
                        raise asyncio.CancelledError
                    elif ending == "failed":
                        raise ConnectionError
            except BudgetError:
                refused.append(index)
            except (ConnectionError, asyncio.CancelledError):
                pass
            check()

        async def run():
            async with asyncio.timeout(20):
                await asyncio.gather(*(one(i, *request) for i, request in enumerate(requests)))

        asyncio.run(run())
        assert not in_flight
        assert not budget._open
        assert not budget._queue
        assert budget.used == sum(billed, Usage())
        assert budget.forfeited_tokens == sum(p + c for p, c in forfeited)
        assert budget.tokens_spent == sum(u.prompt_tokens + u.completion_tokens for u in billed) + (
            budget.forfeited_tokens
        )
        assert budget.usd_spent == pytest.approx(
            sum(map(PRICE.cost, billed)) + sum(PRICE.worst_cost(p, c) for p, c in forfeited)
        )

    @settings(deadline=None, max_examples=50)
    @given(REQUESTS, st.integers(1, 400), st.integers(1, 4), st.integers(0, 500))
    def test_processes(self, requests, max_tokens, num_processes, before):
        """What all processes of a job spend after an earlier run stays within what that run left."""
        budgets = [
            Budget(max_tokens=max_tokens, spent=Usage(before, 0, 0), num_processes=num_processes)
            for _ in range(num_processes)
        ]

        async def one(budget, prompt, completion):
            try:
                async with budget.reserve(prompt, completion) as reservation:
                    await asyncio.sleep(0)
                    reservation.settle(Usage(prompt, 0, completion))
            except BudgetError:
                pass

        async def run():
            await asyncio.gather(
                *(
                    one(budgets[i % num_processes], prompt, completion)
                    for i, (prompt, completion, *_) in enumerate(requests)
                )
            )

        asyncio.run(run())
        assert sum(budget.tokens_spent - before for budget in budgets) <= max(max_tokens - before, 0)

    def test_no_limit(self):
        """Without limits everything goes out at once, and is counted all the same."""

        async def run():
            budget = Budget(price=PRICE)
            requests = [Request(budget, 10**9, 10**9) for _ in range(20)]
            await turns()
            assert all(request.sent for request in requests)
            for request in requests:
                await request.end(Usage(1_000_000, 0, 0))
            return budget

        assert asyncio.run(run()).used_usd == pytest.approx(20)


class TestWaiting:
    """Requests wait while waiting can help."""

    def test_waits_for_room(self):
        """The second request waits for the first, and goes out when that used less than its worst case."""

        async def run():
            budget = Budget(max_tokens=100)
            first, second = Request(budget, 80), Request(budget, 50)
            await turns()
            assert (first.sent, second.sent) == (True, False)
            await first.end(Usage(50, 0, 0))
            assert second.sent
            await second.end(Usage(50, 0, 0))
            assert budget.tokens_spent == 100

        asyncio.run(run())

    def test_waits_in_vain(self):
        """It is refused once the first has used what it was allowed to."""

        async def run():
            budget = Budget(max_tokens=100)
            first, second = Request(budget, 80), Request(budget, 50)
            await turns()
            await first.end(Usage(80, 0, 0))
            with pytest.raises(BudgetError, match="80 of teacher_budget_tokens=100 tokens"):
                await second.task

        asyncio.run(run())

    def test_hopeless_request_does_not_wait(self):
        """What would not fit even if everything in flight were free is refused at once."""

        async def run():
            budget = Budget(max_tokens=100)
            first = Request(budget, 80)
            await turns()
            with pytest.raises(BudgetError):
                async with asyncio.timeout(1), budget.reserve(101, 0):
                    pass
            await first.end(None)

        asyncio.run(run())

    def test_large_request_is_not_starved(self):
        """A stream of small requests does not pass a large one that came first; it waits at most for those before."""

        async def run():
            budget = Budget(max_tokens=100)
            small = [Request(budget, 30) for _ in range(3)]
            await turns()
            large = Request(budget, 90)
            later = [Request(budget, 10) for _ in range(20)]
            await turns()
            assert not any(request.sent for request in [large, *later])  # though one of 10 would fit
            for request in small:
                await request.end(Usage(3, 0, 0))
            assert large.sent
            assert not any(request.sent for request in later)
            await large.end(Usage(9, 0, 0))
            assert [request.sent for request in later] == [True] * 8 + [False] * 12  # in their order
            for request in later:
                await request.end(Usage(1, 0, 0))

        asyncio.run(run())

    def test_first_in_line_leaves(self):
        """A waiting request that is cancelled costs nothing, and lets those behind it through."""

        async def run():
            budget = Budget(max_tokens=100)
            first, large, small = Request(budget, 30), Request(budget, 90), Request(budget, 10)
            await turns()
            assert not small.sent
            large.task.cancel()
            await turns()
            assert small.sent
            assert large.task.cancelled()
            for request in (first, small):
                await request.end(None)
            assert budget.tokens_spent == 0

        asyncio.run(run())

    def test_cancelled_just_after_it_was_let_in(self):
        """Room that is given to a request in the moment of its cancellation is given back."""

        async def run():
            budget = Budget(max_tokens=100)
            async with budget.reserve(100, 0):
                second, third = Request(budget, 100), Request(budget, 100)
                await turns()
            # Nothing has run since the second was let in.
            second.task.cancel()
            await turns()
            assert not second.sent
            assert second.task.cancelled()
            assert third.sent
            await third.end(None)
            assert budget.tokens_spent == 0

        asyncio.run(run())

    def test_another_loop(self):
        """The probe has a loop of its own; the budget that it waited in serves the next one."""
        budget = Budget(max_tokens=100)

        async def run():
            first, second = Request(budget, 70), Request(budget, 70)
            await turns()
            assert not second.sent
            await first.end(None)
            await second.end(Usage(10, 0, 0))

        for _ in range(3):
            asyncio.run(run())
        assert budget.tokens_spent == 30


class TestEndings:
    """How a request ends decides what counts."""

    def test_cancelled_while_in_flight(self):
        """A request that may have reached the service counts with its worst case, and makes way for the others."""

        async def run():
            budget = Budget(max_tokens=100, price=PRICE)
            first, second = Request(budget, 40, 20), Request(budget, 40)
            third = Request(budget, 41)
            await turns()
            assert (second.sent, third.sent) == (True, False)
            first.task.cancel()
            await turns()
            assert budget.forfeited_tokens == 60
            assert budget.forfeited_usd == pytest.approx(PRICE.worst_cost(40, 20))
            with pytest.raises(BudgetError):
                await third.task
            await second.end(Usage(1, 0, 0))
            assert budget.tokens_spent == 61

        asyncio.run(run())

    @pytest.mark.parametrize("price", [PRICE, None])
    @pytest.mark.parametrize("settled", [True, False])
    def test_cancelled_is_in_the_ledger(self, price, settled):
        """The accounts beyond this process hold what a cancelled request may have cost, unless it was settled."""
        ledger = MemoryLedger()

        async def run():
            async with Budget(price=price).reserve(40, 20, ledger) as reservation:
                if settled:
                    reservation.settle(Usage(1, 0, 1))
                raise asyncio.CancelledError

        with pytest.raises(asyncio.CancelledError):
            asyncio.run(run())
        usd = None if price is None else price.worst_cost(40, 20)
        assert ledger.payments == ([] if settled else [(Usage(40, 0, 20), usd)])

    def test_forfeits_count(self):
        """A forfeited worst case leaves no room for what would have fitted."""

        async def run():
            budget = Budget(max_tokens=100)
            async with budget.reserve(60, 0) as reservation:
                reservation.forfeit()
                reservation.forfeit()  # once
            assert budget.tokens_spent == 60
            with pytest.raises(BudgetError):
                async with budget.reserve(41, 0):
                    pass

        asyncio.run(run())

    def test_failed_request_is_free(self):
        """A refused request (429, 400) that the engine does not forfeit counts for nothing."""

        async def run():
            budget = Budget(max_tokens=100)
            for _ in range(5):
                with pytest.raises(ConnectionError):
                    async with budget.reserve(100, 0):
                        raise ConnectionError
            assert budget.tokens_spent == 0

        asyncio.run(run())

    @pytest.mark.parametrize("first", ["settle", "forfeit"])
    def test_settled_twice(self, first):
        """Counting a request twice is a mistake of the caller, and said."""

        async def run():
            async with Budget().reserve(1, 1) as reservation:
                reservation.settle(Usage(1, 0, 1)) if first == "settle" else reservation.forfeit()
                with pytest.raises(RuntimeError, match="count twice"):
                    reservation.settle(Usage(1, 0, 1))

        asyncio.run(run())

    def test_service_that_lies(self, caplog):
        """More than the worst case is counted in full, said once, and stops the requests that come after."""

        async def run():
            budget = Budget(max_usd=100, price=DOLLAR)
            first, second = Request(budget, 20), Request(budget, 20)
            await turns()
            await first.end(Usage(50, 0, 60))
            assert budget.usd_spent == 110
            await second.end(Usage(30, 0, 0))
            assert budget.usd_spent == 140
            with pytest.raises(BudgetError, match=r"140\.0000 of teacher_budget_usd=100 dollars"):
                async with budget.reserve(0, 0):
                    pass

        asyncio.run(run())
        (message,) = caplog.messages
        assert "used 110 tokens" in message
        assert "worst case was 20" in message


class TestLimits:
    """What the limits are."""

    @pytest.mark.parametrize("settled", [0, 40])
    def test_earlier_runs_count(self, settled):
        """What an earlier run used counts against the same limits."""
        budget = Budget(max_usd=100, max_tokens=1000, price=DOLLAR, spent=Usage(settled, 0, 0), spent_usd=settled)

        async def ask(tokens):
            async with budget.reserve(tokens, 0):
                pass

        asyncio.run(ask(100 - settled))
        with pytest.raises(BudgetError, match=f"{settled}.0000 of"):
            asyncio.run(ask(101 - settled))

    def test_share(self):
        """Each of four processes may spend a quarter of what is left, and the message says so."""
        budget = Budget(max_usd=100, price=DOLLAR, spent_usd=20, num_processes=4)

        async def ask(tokens):
            async with budget.reserve(tokens, 0):
                pass

        asyncio.run(ask(20))
        with pytest.raises(BudgetError, match="Each of 4 processes"):
            asyncio.run(ask(21))

    def test_cached_tokens_are_cheaper_and_not_fewer(self):
        """Tokens from a cache count as tokens, and cost less."""
        budget = Budget(price=PRICE)
        budget.add(Usage(1_000_000, 900_000, 0))
        assert budget.tokens_spent == 1_000_000
        assert budget.usd_spent == pytest.approx(0.1 + 0.09)

    def test_dollars_need_a_price(self):
        """A limit in dollars without a price cannot be kept, and is refused with what to do."""
        with pytest.raises(BudgetError, match="teacher_input_price"):
            Budget(max_usd=1.0)
        assert issubclass(BudgetError, TeacherError)

    @pytest.mark.case("T15")
    @pytest.mark.parametrize("name", ["max_usd", "max_tokens"])
    @pytest.mark.parametrize("limit", [0, -1, float("nan"), float("inf")])
    def test_limit_of_nothing(self, name, limit):
        """A limit of 0 would be mistaken for none, and is refused; NaN and infinity are no limits."""
        with pytest.raises(ConfigError, match="must be above 0"):
            Budget(**{name: limit}, price=PRICE)

    def test_no_processes(self):
        """No process, no share."""
        with pytest.raises(ConfigError, match="num_processes=0"):
            Budget(num_processes=0)

    def test_message(self):
        """The refusal says what is spent, what the next request may need, and what to do."""

        async def run(spent):
            async with Budget(max_usd=1, max_tokens=10, price=PRICE, spent=Usage(spent)).reserve(11, 2):
                pass

        for spent in (0, 3):
            with pytest.raises(BudgetError) as error:
                asyncio.run(run(spent))
            message = str(error.value)
            assert "0.0000 of teacher_budget_usd=1 dollars are spent, and the next request may cost 0.0000" in message
            assert f"{spent} of teacher_budget_tokens=10 tokens are spent, and the next request may use 13" in message
            assert "Raise the budget and start the command again" in message
            # A run that has paid nothing has nothing to resume from.
            assert ("training with resume_from_checkpoint=True" in message) == (spent > 0)


def test_what_is_in_flight_is_noted_before_it_is_sent():
    """The peak since nothing was in flight; then that nothing is. Without a price, no dollars."""

    async def run(price, noted):
        budget = Budget(price=price)
        requests = []

        class Peaks(NoLedger):
            def in_flight(self, tokens, usd):
                noted.append((tokens, usd, sum(r.sent for r in requests)))

        budget.ledger = Peaks()
        for prompt in (30, 20):
            requests.append(Request(budget, prompt, 10))
            await turns()
        await requests[0].end(Usage(1, 0, 1))  # 30 are left, and 30 more are not the most
        requests.append(Request(budget, 25, 5))
        await turns()
        requests.append(Request(budget, 40))
        await turns()
        for request in requests[1:]:
            await request.end(Usage(1, 0, 1))
        requests.append(Request(budget, 7))
        await turns()
        requests[-1].task.cancel()
        await turns()

    noted = []
    asyncio.run(run(DOLLAR, noted))
    assert noted == [(40, 40.0, 0), (70, 70.0, 1), (100, 100.0, 3), (0, 0.0, 4), (7, 7.0, 4), (0, 0.0, 5)]
    noted = []
    asyncio.run(run(None, noted))
    assert [usd for _, usd, _ in noted] == [None] * 6


def test_a_request_that_cannot_be_written_down_is_not_sent():
    """The error is its own; what is in flight continues, and so does what comes after."""

    async def run():
        budget = Budget()
        first = Request(budget, 10)
        await turns()

        class Full(NoLedger):
            def in_flight(self, tokens, usd):
                raise OSError("no space left")

        budget.ledger = Full()
        second = Request(budget, 10)
        await turns()
        assert not second.sent
        with pytest.raises(OSError, match="no space left"):
            await second.task
        budget.ledger = ledger = MemoryLedger()
        third = Request(budget, 10)
        await turns()
        assert third.sent
        assert ledger.peaks == [(20, None)], "a peak that could not be noted is noted with the next request"
        for request in (first, third):
            await request.end(Usage(5, 0, 0))
        assert budget.tokens_spent == 10

    asyncio.run(run())


def test_many_in_little_time():
    """A thousand requests through a narrow budget: each is let through, in order."""
    order = []

    async def one(budget, index):
        async with budget.reserve(10, 0) as reservation:
            order.append(index)
            await asyncio.sleep(0)
            reservation.settle(Usage(random.Random(index).randrange(3), 0, 0))

    async def run():
        budget = Budget(max_tokens=3000)
        async with asyncio.TaskGroup() as group:
            for index in range(1000):
                group.create_task(one(budget, index))

    asyncio.run(run())
    assert order == list(range(1000))
