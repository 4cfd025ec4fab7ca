# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Prices: the recipe's, the table's, and worst cases that are never too low."""

import socket
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from types import SimpleNamespace

import genai_prices
import pytest
from genai_prices import data_snapshot
from genai_prices.types import (
    ConditionalPrice,
    ModelPrice,
    StartDateConstraint,
    Tier,
    TieredPrices,
    TimeOfDateConstraint,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from omniopd_trl.accounting import pricing
from omniopd_trl.accounting.pricing import Price, TablePrice, price_of, prompt_parts
from omniopd_trl.accounting.usage import Usage
from omniopd_trl.errors import ConfigError

OURS = {"anthropic": "anthropic", "google": "gemini", "openai": "openai"}


def priced_models():
    """Every model of the three services that the table prices by tokens of text."""
    for provider in data_snapshot.get_snapshot().providers:
        for model in provider.models if provider.id in OURS else ():
            prices = model.get_prices(datetime.now(tz=UTC))
            # The reference of a model is what matches it; its id always should.
            if prices.input_mtok is not None and prices.output_mtok is not None and model.is_match(model.id):
                yield OURS[provider.id], model.id


def usages():
    """Prompts around the tiers' borders, with any part of them cached."""
    prompts = st.integers(0, 400_000) | st.sampled_from([128_000, 200_000, 200_001, 272_000, 272_001])
    return st.tuples(prompts, st.floats(0, 1), st.integers(0, 5_000)).map(
        lambda parts: Usage(parts[0], int(parts[0] * parts[1]), parts[2])
    )


def reference(price, usage):
    """What genai-prices says itself."""
    counts = genai_prices.Usage(
        input_tokens=usage.prompt_tokens,
        cache_read_tokens=usage.cached_tokens,
        output_tokens=usage.completion_tokens,
    )
    return float(genai_prices.calc_price(counts, model_ref=price.model, provider_id=price.provider).total_price)


class TestTable:
    """Prices that genai-prices knows."""

    @pytest.mark.parametrize(
        ("provider", "model", "rates"),
        [
            ("anthropic", "claude-haiku-4-5", (1.0, 5.0, 0.1, 1.25)),
            ("anthropic", "claude-haiku-4-5-20251001", (1.0, 5.0, 0.1, 1.25)),
            ("gemini", "gemini-2.5-flash", (0.3, 2.5, 0.03, None)),
            ("gemini", "gemini-3.5-flash-lite", (0.3, 2.5, 0.03, None)),
            ("openai", "gpt-6-luna", (0.1, 0.5, 0.01, 0.125)),
        ],
    )
    def test_known(self, provider, model, rates):
        """Models that the recipes name, dated names included."""
        price = price_of(provider, model)
        assert (price.input, price.output, price.cache_read, price.cache_write) == rates

    @settings(deadline=None)  # the first call loads the table
    @given(st.sampled_from(sorted(priced_models())), usages())
    def test_cost_is_that_of_the_table(self, model, usage):
        """Every model, every tier, any part cached: exactly what genai-prices' own calculation says."""
        price = price_of(*model)
        assert price.cost(usage) == pytest.approx(reference(price, usage), rel=1e-9, abs=1e-15)

    @settings(deadline=None)  # the first call loads the table
    @given(st.sampled_from(sorted(priced_models())), usages(), st.integers(0, 1000), st.integers(0, 1000))
    def test_worst_case_is_an_upper_bound(self, model, usage, more_prompt, more_completion):
        """A request that uses at most its worst case never costs more than it."""
        price = price_of(*model)
        worst = price.worst_cost(usage.prompt_tokens + more_prompt, usage.completion_tokens + more_completion)
        assert price.cost(usage) <= worst * (1 + 1e-9)

    def test_tiers(self):
        """The whole of a long request costs what its tier says; the token before it does not."""
        price = price_of("gemini", "gemini-2.5-pro")
        assert price.cost(Usage(200_000, 0, 1000)) == pytest.approx(0.2 * 1.25 + 0.001 * 10)
        assert price.cost(Usage(200_001, 0, 1000)) == pytest.approx(0.200001 * 2.5 + 0.001 * 15)
        assert price.at(1).output == 10
        assert price.at(200_001).output == 15

    def test_worst_case_of_a_short_prompt(self):
        """A prompt that cannot reach the dear tier does not hold money for it."""
        price = price_of("gemini", "gemini-2.5-pro")
        assert price.worst_cost(200_000, 1000) == pytest.approx(0.2 * 1.25 + 0.001 * 10)
        assert price.worst_cost(200_001, 1000) == pytest.approx(0.200001 * 2.5 + 0.001 * 15)

    def test_written_tokens_cost_more(self):
        """Where a service counts the tokens that filled its cache, they cost what the table says."""
        usage = SimpleNamespace(prompt_tokens=1000, cached_tokens=100, cache_write_tokens=500, completion_tokens=10)
        price = price_of("anthropic", "claude-haiku-4-5")
        assert price.cost(usage) == pytest.approx((400 * 1 + 100 * 0.1 + 500 * 1.25 + 10 * 5) / 1e6)
        assert price.cost(usage) <= price.worst_cost(1000, 10)

    def test_no_network(self, monkeypatch):
        """Looking a price up opens no connection, and the table is the one that was installed."""

        def refuse(*args, **kwargs):
            raise AssertionError("a connection was opened")

        monkeypatch.setattr(socket.socket, "connect", refuse)
        monkeypatch.setattr(socket, "getaddrinfo", refuse)
        pricing._tiers.cache_clear()
        data_snapshot._bundled_snapshot.cache_clear()
        assert price_of("anthropic", "claude-haiku-4-5").output == 5
        assert not data_snapshot.get_snapshot().from_auto_update


class TestDates:
    """Prices that change."""

    @pytest.fixture
    def entries(self, monkeypatch):
        """A model whose prices a test sets."""
        entries = []
        model = SimpleNamespace(
            prices=entries, get_prices=lambda now: next(e.prices for e in reversed(entries) if active(e, now))
        )
        monkeypatch.setattr(pricing, "_model_info", lambda provider, name: model)
        pricing._tiers.cache_clear()
        pricing._tiers_soon.cache_clear()
        yield entries
        pricing._tiers.cache_clear()
        pricing._tiers_soon.cache_clear()

    @staticmethod
    def entry(rate, constraint=None):
        return ConditionalPrice(constraint, prices=ModelPrice(input_mtok=Decimal(rate), output_mtok=Decimal(rate)))

    def worst(self):
        return TablePrice(0, 0, provider="p", model="m").worst_cost(1_000_000, 0)

    def test_coming_price_counts(self, entries):
        """A higher price that begins within a day counts for the worst case; one in a month does not yet."""
        today = datetime.now(tz=UTC).date()
        entries[:] = [self.entry(1), self.entry(9, StartDateConstraint(today + timedelta(days=30)))]
        assert self.worst() == 1
        entries[1] = self.entry(9, StartDateConstraint(today + timedelta(days=1)))
        pricing._tiers_soon.cache_clear()
        assert self.worst() == 9

    def test_past_price_does_not_count(self, entries):
        """A price that another one has replaced for good is no worst case."""
        entries[:] = [self.entry(9), self.entry(1, StartDateConstraint(date(2020, 1, 1)))]
        assert self.worst() == 1

    def test_time_of_day(self, entries):
        """A price for some hours of the day counts at any hour, and so does the one that it replaces."""
        entries[:] = [self.entry(5), self.entry(9, TimeOfDateConstraint(time(0, 0), time(0, 1)))]
        assert self.worst() == 9
        entries[:] = [self.entry(9), self.entry(5, TimeOfDateConstraint(time(0, 0), time(0, 1)))]
        pricing._tiers_soon.cache_clear()
        assert self.worst() == 9

    def test_tier_that_is_cheaper(self, entries):
        """A discount for long prompts does not lower the worst case of a request that may stay short."""
        rate = TieredPrices(base=Decimal(9), tiers=[Tier(100, Decimal(1))])
        entries[:] = [ConditionalPrice(prices=ModelPrice(input_mtok=rate, output_mtok=rate))]
        assert self.worst() == 9


def active(entry, now):
    return entry.constraint is None or entry.constraint.active(now)


class TestRecipe:
    """Prices of the recipe."""

    def test_wins(self):
        """Given prices win over the table."""
        assert price_of("openai", "gpt-6-luna", input_price=3, output_price=4) == Price(3.0, 4.0)

    @pytest.mark.parametrize("provider", ["vllm", "openai", "mine"])
    def test_any_service(self, provider):
        """They price a service that no table knows, cached tokens at the input's price unless told."""
        price = price_of(provider, "m", input_price=2, output_price=4, base_url="http://127.0.0.1:1/v1")
        assert price.cost(Usage(1_000_000, 500_000, 1_000_000)) == pytest.approx(6)
        price = price_of(provider, "m", input_price=2, output_price=4, cached_price=0.2)
        assert price.cost(Usage(1_000_000, 500_000, 1_000_000)) == pytest.approx(5.1)

    def test_anthropic_cache_writes(self):
        """Filling Anthropic's cache costs a quarter more, which the worst case covers."""
        price = price_of("anthropic", "m", input_price=2, output_price=4)
        assert price.worst_cost(1_000_000, 0) == pytest.approx(2.5)

    @pytest.mark.parametrize(
        ("prices", "message"),
        [
            ({"input_price": 1}, "teacher_input_price=1, without teacher_output_price"),
            ({"output_price": 1, "cached_price": 2}, "without teacher_input_price"),
            ({"cached_price": 2}, "without teacher_input_price and teacher_output_price"),
            ({"input_price": -1, "output_price": 1}, "teacher_input_price=-1"),
            ({"input_price": 1, "output_price": float("nan")}, "teacher_output_price=nan"),
            ({"input_price": 1, "output_price": float("inf")}, "teacher_output_price=inf"),
            ({"input_price": True, "output_price": 1}, "teacher_input_price=True"),
        ],
    )
    def test_refused(self, prices, message):
        """Prices in part, or that are no prices, are refused by name."""
        with pytest.raises(ConfigError, match=message):
            price_of("openai", "gpt-6-luna", **prices)

    def test_nothing_is_free_of_charge(self):
        """A price of 0 is a price, of a self-hosted server."""
        assert price_of("vllm", "m", input_price=0, output_price=0) == Price(0.0, 0.0)


class TestUnknown:
    """No price: only tokens are counted."""

    @pytest.mark.parametrize(
        ("provider", "model", "base_url"),
        [
            ("vllm", "claude-haiku-4-5", None),
            ("", "gpt-6-luna", None),
            ("openai", "gpt-6-luna", "http://127.0.0.1:1/v1"),
            ("openai", "no-such-model", None),
            ("anthropic", "gpt-6-luna", None),
        ],
    )
    def test_none(self, provider, model, base_url):
        """A self-hosted server has no price, whatever its model is called; nor has an unknown model."""
        assert price_of(provider, model, base_url=base_url) is None

    def test_without_completions(self):
        """A model that has no price for text that it writes, such as one for embeddings, has none here."""
        assert price_of("openai", "text-embedding-3-small") is None

    def test_said_once(self, caplog):
        """The message names the teacher and the settings that fix it, once."""
        for _ in range(3):
            price_of("openai", "said-once")
        (message,) = caplog.messages
        assert "openai:said-once" in message
        assert "teacher_input_price" in message


@pytest.mark.parametrize(
    ("usage", "parts"),
    [
        (Usage(100, 30, 1), (100, 30, 0)),
        (Usage(100, 300, 1), (100, 100, 0)),
        (Usage(0, 3, 1, 0, 7), (0, 0, 0)),
        (SimpleNamespace(prompt_tokens=100, cached_tokens=80, cache_write_tokens=50), (100, 80, 20)),
    ],
)
def test_prompt_parts(usage, parts):
    """Counts that contradict each other are cut: nothing costs less than 0."""
    assert prompt_parts(usage) == parts
