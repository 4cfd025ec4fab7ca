# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Prices of teachers, from the recipe or else from the table that genai-prices ships.

The table is read from the installed package and never from a network: genai-prices fetches newer prices only in
`UpdatePrices`, which this package does not use. `pip install -U genai-prices` installs a newer table.
"""

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any

from omniopd_trl.accounting.usage import Usage
from omniopd_trl.errors import ConfigError

# Provider ids of genai-prices. Your own server (`vllm:`) and local models have no price there.
_PROVIDERS = {
    "anthropic": "anthropic",
    "azure": "azure",
    "bedrock": "aws",
    "gemini": "google",
    "openai": "openai",
    "vertex": "google",
}

# Claude's providers charge 25% more for prompt tokens that they write to the five-minute cache.
_CACHE_WRITE_FACTOR = 1.25
_CHARGE_WRITES = ("anthropic", "bedrock", "vertex")

# The worst case includes prices that start within this time, since a request may still be in flight then.
_LOOK_AHEAD = timedelta(days=1)


@dataclass(frozen=True)
class Price:
    """US dollars per million tokens.

    Attributes:
        input: prompt tokens that no cache served.
        output: completion tokens, hidden reasoning included.
        cache_read: prompt tokens that a cache served. `None` charges them as `input`.
        cache_write: prompt tokens that were written to a cache. `None` charges them as `input`.
    """

    input: float
    output: float
    cache_read: float | None = None
    cache_write: float | None = None

    def at(self, prompt_tokens: float) -> "Price":
        """The flat price of a request with this many prompt tokens. Some services charge more for long prompts."""
        return self

    def cost(self, usage: Usage) -> float:
        """Dollars for the usage of one request."""
        return self.dollars(*prompt_parts(usage), usage.completion_tokens)

    def dollars(self, prompt: float, read: float, written: float, completion: float) -> float:
        """Dollars for tokens at these rates; `read` and `written` are the part of the prompt in a cache."""
        read_price = self.input if self.cache_read is None else self.cache_read
        write_price = self.input if self.cache_write is None else self.cache_write
        plain = prompt - read - written
        return (plain * self.input + read * read_price + written * write_price + completion * self.output) / 1e6

    def worst_cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        """The most that a request of at most this size can cost, in dollars."""
        highest = max(self.input, self.cache_read or 0.0, self.cache_write or 0.0)
        return (prompt_tokens * highest + completion_tokens * self.output) / 1e6


def prompt_parts(usage: Usage) -> tuple[int, int, int]:
    """Prompt tokens: all of them, those read from a cache, and those written to one.

    Cached tokens are clipped to the prompt tokens if a service reports more.
    """
    prompt = usage.prompt_tokens
    read = min(usage.cached_tokens, prompt)
    # Only services that charge for cache writes report these tokens. Others leave them at 0.
    written = min(usage.cache_write_tokens, prompt - read)
    return prompt, read, written


@dataclass(frozen=True)
class TablePrice(Price):
    """The price of a model in genai-prices, with its tiers and start dates.

    `input`, `output`, `cache_read` and `cache_write` hold the rates of a short prompt at the time of construction.

    Attributes:
        provider: id of the provider in genai-prices.
        model: name of the model as the service knows it.
    """

    provider: str = field(default="", kw_only=True)
    model: str = field(default="", kw_only=True)

    def at(self, prompt_tokens: float) -> Price:
        tiers = _tiers(self.provider, self.model, _minute())
        return next(flat for start, flat in reversed(tiers) if prompt_tokens > start)

    def cost(self, usage: Usage) -> float:
        """Dollars for the usage of one request.

        Equals `calc_price` of genai-prices (a test compares them) and takes a tenth of its time.
        """
        return self.at(usage.prompt_tokens).cost(usage)

    def worst_cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        """The most that a request of at most this size can cost, in dollars.

        Covers every tier that the request may fall into and every price that may be in force when it is settled. All
        prompt tokens are charged at the highest rate.
        """
        tiers = _tiers_soon(self.provider, self.model, _minute())
        flats = [flat for start, flat in tiers if prompt_tokens > start]
        highest = max(max(flat.input, flat.cache_read or 0.0, flat.cache_write or 0.0) for flat in flats)
        return (prompt_tokens * highest + completion_tokens * max(flat.output for flat in flats)) / 1e6


# What a token costs in a batch, relative to the standard price, by provider. Each of them charges half of it for
# prompts and completions (November 2026):
#   openai     https://developers.openai.com/api/docs/guides/batch
#   anthropic  https://platform.claude.com/docs/en/build-with-claude/batch-processing
#   gemini     https://ai.google.dev/gemini-api/docs/batch-api
BATCH_TARIFFS = {"openai": 0.5, "anthropic": 0.5, "gemini": 0.5}


@dataclass(frozen=True)
class BatchPrice(Price):
    """The price of requests in a batch.

    Services do not agree on what a cached token costs in a batch: half of its standard price, or all of it. It is
    counted at the standard price, and at the batch price of other prompt tokens where that is lower.

    Attributes:
        standard: the price of single requests.
        factor: price of a token relative to it.
    """

    standard: Price = field(kw_only=True)
    factor: float = field(kw_only=True)

    def at(self, prompt_tokens: float) -> Price:
        return _in_batch(self.standard.at(prompt_tokens), self.factor)

    def cost(self, usage: Usage) -> float:
        return self.at(usage.prompt_tokens).cost(usage)

    def worst_cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        return self.factor * self.standard.worst_cost(prompt_tokens, completion_tokens)


def batch_price(provider: str, price: Price) -> BatchPrice:
    """The price of requests in a batch of a provider of `BATCH_TARIFFS`.

    Args:
        provider: prefix of the teacher's name.
        price: the standard price of the teacher.
    """
    factor = BATCH_TARIFFS[provider]
    flat = _in_batch(price, factor)
    return BatchPrice(flat.input, flat.output, flat.cache_read, flat.cache_write, standard=price, factor=factor)


def _in_batch(flat: Price, factor: float) -> Price:
    read = None if flat.cache_read is None else min(flat.cache_read, factor * flat.input)
    write = None if flat.cache_write is None else factor * flat.cache_write
    return Price(factor * flat.input, factor * flat.output, read, write)


def price_of(
    provider: str,
    model: str,
    *,
    input_price: float | None = None,
    output_price: float | None = None,
    cached_price: float | None = None,
    base_url: str | None = None,
) -> Price | None:
    """The price of a teacher.

    Args:
        provider: prefix of the teacher's name, for example `"anthropic"` or `"azure"`, or anything else.
        model: the rest of the name, as the service knows the model.
        input_price: dollars per million prompt tokens. Overrides the table; needs `output_price`.
        output_price: dollars per million completion tokens. Overrides the table; needs `input_price`.
        cached_price: dollars per million prompt tokens that a cache served. Defaults to `input_price`.
        base_url: address of the service, if it is not the provider's default. The table is used for addresses that it
            knows, such as OpenRouter's, since other services implement the same protocol at other prices.

    Returns:
        The price, or `None` if it is not known: only tokens are counted then, and a warning is logged once.

    Raises:
        ConfigError: when only one of the two prices is given, or a price is not a number of at least 0.
    """
    given = {
        "teacher_input_price": input_price,
        "teacher_output_price": output_price,
        "teacher_cached_price": cached_price,
    }
    for name, value in given.items():
        if value is not None and not (_is_number(value) and 0 <= value < float("inf")):
            raise ConfigError(f"{name}={value!r} must be a number of at least 0, in dollars per million tokens.")
    if input_price is not None and output_price is not None:
        write = input_price * _CACHE_WRITE_FACTOR if provider in _CHARGE_WRITES else None
        return Price(float(input_price), float(output_price), cached_price, write)
    if any(value is not None for value in given.values()):
        missing = [name for name in ("teacher_input_price", "teacher_output_price") if given[name] is None]
        raise ConfigError(
            f"Prices are given in part: {', '.join(f'{n}={v}' for n, v in given.items() if v is not None)}, without "
            f"{' and '.join(missing)}. Give both, or none of them."
        )
    try:
        table = _table_of(provider, base_url)
        ((_, flat), *_) = _tiers(table, model, _minute())
    except LookupError:
        _log_tokens_only(provider, model)
        return None
    return TablePrice(flat.input, flat.output, flat.cache_read, flat.cache_write, provider=table, model=model)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _log_tokens_only(provider: str, model: str) -> None:
    from transformers.utils import logging

    name = f"{provider}:{model}" if provider else model
    logging.get_logger(__name__).warning_once(
        f"The price of {name} is not known: only its tokens are counted, not dollars. Set "
        "`teacher_input_price` and `teacher_output_price`, in dollars per million tokens, to count dollars too."
    )


# Prices change on full minutes only. Rounding lets the cached look-ups hit; a look-up for each request would be slow.
def _minute() -> datetime:
    return datetime.now(tz=UTC).replace(second=0, microsecond=0)


_Tiers = list[tuple[int, Price]]


@lru_cache(maxsize=64)
def _tiers(provider: str, model: str, now: datetime) -> _Tiers:
    """The price in force, as pairs of the prompt length above which a tier applies and its rates, in ascending order.

    Raises:
        LookupError: when there is no price, or none for text prompts and completions.
    """
    prices = _model_info(provider, model).get_prices(now)
    if prices.input_mtok is None or prices.output_mtok is None:
        raise LookupError(f"{model} is not priced by tokens of text")
    return _by_tier(prices)


@lru_cache(maxsize=64)
def _tiers_soon(provider: str, model: str, now: datetime) -> _Tiers:
    """The tiers of every price that may be in force while a request is in flight."""
    entries = _model_info(provider, model).prices
    if not isinstance(entries, list):
        return _by_tier(entries)
    found = [entries[0].prices]  # the fallback if no entry is active
    # The last active entry applies. Entries by time of day may become active at any time. Entries before one that is
    # active from some date on never apply.
    for entry in reversed(entries):
        by_date = entry.constraint is None or hasattr(entry.constraint, "start_date")
        if not by_date or entry.constraint is None or entry.constraint.active(now + _LOOK_AHEAD):
            found.append(entry.prices)
        if by_date and (entry.constraint is None or entry.constraint.active(now)):
            found = found[1:]
            break
    return [tier for prices in found for tier in _by_tier(prices)]


def _table_of(provider: str, base_url: str | None) -> str:
    """Id in genai-prices of the service at an address.

    Raises:
        LookupError: when there is none.
    """
    if base_url is None or provider not in _PROVIDERS:
        return _PROVIDERS[provider]
    from genai_prices.data_snapshot import get_snapshot

    return str(get_snapshot().find_provider(None, None, base_url).id)


def _model_info(provider: str, model: str) -> Any:
    """The model's entry in genai-prices.

    Raises:
        LookupError: when there is no entry.
    """
    from genai_prices.data_snapshot import get_snapshot

    return get_snapshot().find_provider_model(model, None, provider, None)[1]


def _by_tier(prices: Any) -> _Tiers:
    """The rates of each tier. A tier applies to all tokens of a request whose prompt is longer than its start."""
    rates = (prices.input_mtok, prices.output_mtok, prices.cache_read_mtok, prices.cache_write_mtok)
    starts = {-1, *(tier.start for rate in rates if hasattr(rate, "tiers") for tier in rate.tiers)}

    def rate_above(rate: Any, start: int) -> float | None:
        if hasattr(rate, "tiers"):
            rate = next((tier.price for tier in reversed(rate.tiers) if start >= tier.start), rate.base)
        return None if rate is None else float(rate)

    return [
        (
            start,
            Price(
                rate_above(rates[0], start) or 0.0,
                rate_above(rates[1], start) or 0.0,
                rate_above(rates[2], start),
                rate_above(rates[3], start),
            ),
        )
        for start in sorted(starts)
    ]
