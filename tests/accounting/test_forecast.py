# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The forecast against counting request by request, and against the paper's Table 8."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.table8 import TABLE_8, main, table
from omniopd_trl.accounting.budget import Budget
from omniopd_trl.accounting.forecast import DECODE_TO_PREFILL, forecast
from omniopd_trl.accounting.pricing import Price, price_of
from omniopd_trl.accounting.usage import Usage
from omniopd_trl.errors import ConfigError
from omniopd_trl.method.chunks import select_chunks
from tests.support import ROOT

PRICE = Price(1.0, 5.0, 0.1, 1.25)
PAPER = {"prompt_tokens": 200, "trajectory_length": 6340, "asked_per_token": 1.0}


class TestFormulas:
    """Section 9."""

    def test_worked_example(self):
        """The two figures of the paper's text: 33,700 prefilled tokens, and 10,000 decoded ones with N = 20."""
        audit = forecast(**PAPER, num_chunks=10, num_rollouts=20, chunk_length=50).trajectory
        assert audit.prompt_tokens == pytest.approx(33_700)
        assert audit.completion_tokens == 10_000

    @given(
        st.integers(1, 2000),
        st.integers(1, 20_000),
        st.integers(1, 20),
        st.integers(1, 200),
        st.integers(1, 30),
        st.integers(1, 30),
    )
    def test_any_setting(self, prompt, length, chunks, chunk, rollouts, samples):
        """Decode M N C, prefill ceil(N / k) M (prompt + L / 2), wherever the trajectory holds M chunks."""
        audit = forecast(
            prompt_tokens=prompt,
            trajectory_length=length + chunks * chunk,
            num_chunks=chunks,
            chunk_length=chunk,
            num_rollouts=rollouts,
            samples_per_request=samples,
            asked_per_token=1.0,
        ).trajectory
        requests = chunks * math.ceil(rollouts / samples)
        assert audit.requests == requests
        assert audit.completion_tokens == chunks * rollouts * chunk
        assert audit.prompt_tokens == pytest.approx(requests * (prompt + (length + chunks * chunk) / 2))

    @pytest.mark.parametrize("samples", [1, 4, 10])
    def test_first_rollouts(self, samples):
        """A mixture of chunks with all rollouts and chunks with the first ones, and at most one request more."""
        paper = {**PAPER, "price": PRICE, "min_cached_prefix": 0, "samples_per_request": samples}
        few, all_ = (forecast(**paper, num_rollouts=n).trajectory for n in (4, 10))
        mixed, most = (forecast(**paper, first_rollouts=4, stopped_share=s).trajectory for s in (0.25, 0.0))
        assert mixed.completion_tokens == pytest.approx(0.25 * few.completion_tokens + 0.75 * all_.completion_tokens)
        assert most.completion_tokens == all_.completion_tokens
        assert most.requests == {1: 100, 4: 30, 10: 20}[samples]
        assert mixed.requests == pytest.approx(0.25 * few.requests + 0.75 * most.requests)
        assert mixed.prompt_tokens == pytest.approx(0.25 * few.prompt_tokens + 0.75 * most.prompt_tokens)
        assert mixed.no_cache.usd < most.no_cache.usd
        with pytest.raises(ConfigError, match="first_rollouts=10 must be at least 2, and below num_rollouts=10"):
            forecast(**paper, first_rollouts=10)

    def test_what_is_asked_and_what_is_kept(self):
        """Requests ask for 1.4 tokens per token, which are all charged for, and one is compared."""
        audit = forecast(prompt_tokens=200, trajectory_length=6340).trajectory
        assert audit.completion_tokens == 7_000
        assert audit.kept_tokens == 5_000

    @pytest.mark.parametrize(
        ("length", "chunks", "size"), [(499, 9, 50), (99, 1, 50), (50, 1, 50), (49, 1, 49), (8, 1, 8), (7, 0, 0)]
    )
    def test_short_trajectories(self, length, chunks, size):
        """Fewer chunks where there is no room for M, one shorter chunk, or none."""
        audit = forecast(prompt_tokens=10, trajectory_length=length, asked_per_token=1.0, price=PRICE).trajectory
        assert audit.requests == chunks
        assert audit.completion_tokens == chunks * 10 * size
        if not chunks:
            assert audit.no_cache.usd == 0

    def test_steps_and_run(self):
        """A step is its prompts, a run its steps; SFT pays once for each distinct prompt."""
        result = forecast(**PAPER, price=PRICE, prompts_per_step=16, steps=50, num_prompts=300, solution_length=8000)
        assert result.step.prompt_tokens == pytest.approx(16 * 33_700)
        assert result.run.completion_tokens == pytest.approx(50 * 16 * 5_000)
        assert result.run.no_cache.usd == pytest.approx(50 * 16 * result.trajectory.no_cache.usd)
        assert result.sft_run.completion_tokens == pytest.approx(300 * 8_000)
        assert result.sft_run.no_cache.usd == pytest.approx(300 * (200 * 1 + 8000 * 5) / 1e6)
        assert forecast(**PAPER, prompts_per_step=16, steps=50).sft_run.requests == 800

    def test_tokens_of_the_teacher(self):
        """Another tokenizer scales prompts and solutions; a template adds to each prompt."""
        result = forecast(**PAPER | {"asked_per_token": 1.4}, tokens_per_token=1.2, prompt_overhead=30)
        assert result.trajectory.prompt_tokens == pytest.approx(10 * (30 + 1.2 * 3370))
        assert result.trajectory.kept_tokens == pytest.approx(6_000)
        assert result.trajectory.completion_tokens == 7_000
        assert result.sft_prompt.completion_tokens == pytest.approx(1.2 * 6340)

    def test_lengths_of_prompts(self):
        """A list of lengths gives the mean of their forecasts, tiers and cache thresholds included."""
        settings = {"trajectory_length": 6340, "price": PRICE, "samples_per_request": 1, "min_cached_prefix": 4096}
        each = [forecast(prompt_tokens=length, **settings).trajectory for length in (100, 900, 900, 5000)]
        together = forecast(prompt_tokens=[100, 900, 900, 5000], **settings).trajectory
        assert together.prompt_tokens == pytest.approx(sum(load.prompt_tokens for load in each) / 4)
        for cache in ("no_cache", "chunk_cache", "trajectory_cache"):
            assert getattr(together, cache).usd == pytest.approx(sum(getattr(load, cache).usd for load in each) / 4)
        mean = forecast(prompt_tokens=6900 / 4, **settings).trajectory
        assert together.chunk_cache.cached_tokens != pytest.approx(mean.chunk_cache.cached_tokens)

    def test_chunks_that_a_run_found(self):
        """A mean between two whole numbers mixes trajectories with as many chunks as either, caches included."""
        settings = {**PAPER, "samples_per_request": 1, "price": PRICE, "min_cached_prefix": 2000}
        few, many = (forecast(**settings, chunks_per_trajectory=number).trajectory for number in (6, 7))
        mixed = forecast(**settings, chunks_per_trajectory=6.25).trajectory
        assert mixed.requests == pytest.approx(62.5)
        assert mixed.prompt_tokens == pytest.approx(62.5 * (200 + 6340 / 2))
        assert mixed.completion_tokens == pytest.approx(6.25 * 500)
        for cache in ("no_cache", "chunk_cache", "trajectory_cache"):
            expected = 0.75 * getattr(few, cache).usd + 0.25 * getattr(many, cache).usd
            assert getattr(mixed, cache).usd == pytest.approx(expected)

    @pytest.mark.parametrize("cache", ["no_cache", "chunk_cache", "trajectory_cache"])
    def test_as_many_chunks_as_assumed(self, cache):
        """To give the number that is assumed changes nothing."""
        settings = {**PAPER, "samples_per_request": 4, "price": PRICE, "num_chunks": 8}
        assert getattr(forecast(**settings).run, cache) == getattr(
            forecast(**settings, chunks_per_trajectory=8.0).run, cache
        )

    @pytest.mark.parametrize(("written", "kept"), [(90.0, 50), (70, 50), (30.5, 30.5)])
    def test_tokens_that_a_run_wrote(self, written, kept):
        """They replace what is asked for, are what is paid, and bound what can be compared."""
        audit = forecast(**PAPER, rollout_tokens=written, price=PRICE).trajectory
        assert audit.completion_tokens == pytest.approx(100 * written)
        assert audit.kept_tokens == pytest.approx(100 * kept)
        assert audit.no_cache.usd == pytest.approx((33_700 + 100 * written * 5) / 1e6)

    @pytest.mark.parametrize("overlap", ["resample", "merge"])
    def test_measured_against_real_chunks(self, overlap):
        """With what the selection really gives, the forecast is the sum over its requests."""
        length, rollouts = 700, 10
        rng = np.random.default_rng(0)
        audits = [
            select_chunks(rng.random(length), num_chunks=10, chunk_length=50, overlap=overlap) for _ in range(400)
        ]
        chunks = [chunk for audit in audits for chunk in audit]
        asked = sum(len(audit) * math.ceil(1.4 * max(c.end - c.start for c in audit)) for audit in audits)
        result = forecast(
            prompt_tokens=100,
            trajectory_length=length,
            samples_per_request=1,
            chunks_per_trajectory=len(chunks) / len(audits),
            rollout_tokens=asked / len(chunks),
        ).trajectory
        assert result.completion_tokens == pytest.approx(rollouts * asked / len(audits))
        # Chunks start a little earlier than at L / 2 on average, as the last one ends with the trajectory.
        prompts = sum(rollouts * (100 + chunk.start) for chunk in chunks) / len(audits)
        assert result.prompt_tokens == pytest.approx(prompts, rel=0.05)
        if overlap == "merge":
            # Fewer chunks, and yet more to pay for than the formula says.
            assert len(chunks) / len(audits) < 6
            formula = forecast(prompt_tokens=100, trajectory_length=length).trajectory
            assert result.completion_tokens > 1.1 * formula.completion_tokens

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"num_chunks": 0}, "num_chunks=0"),
            ({"samples_per_request": 0}, "samples_per_request=0"),
            ({"prompt_tokens": []}, "prompt_tokens"),
            ({"prompt_tokens": [5, -1]}, "prompt_tokens=-1"),
            ({"trajectory_length": math.nan}, "trajectory_length=nan"),
            ({"trajectory_length": math.inf}, "trajectory_length=inf"),
            ({"chunks_per_trajectory": 10.5}, "chunks_per_trajectory=10.5 must be between 0 and num_chunks=10"),
            ({"chunks_per_trajectory": -1}, "chunks_per_trajectory=-1 must be between"),
            ({"chunks_per_trajectory": math.nan}, "chunks_per_trajectory=nan must be between"),
            ({"rollout_tokens": -1}, "rollout_tokens=-1 must be a number of at least 0"),
            ({"asked_per_token": 0.9}, "asked_per_token=0.9 must be a number of at least 1.0"),
        ],
    )
    def test_refused(self, settings, message):
        """A number out of range is named, with the rule."""
        with pytest.raises(ConfigError, match=message):
            forecast(**PAPER | settings)


class SimulatedCache:
    """A service that caches prompts, each a number of tokens of one trajectory."""

    def __init__(self, min_prefix):
        self.min_prefix, self.longest = min_prefix, 0

    def ask(self, prompt):
        """Tokens that are read from the cache and written to it."""
        if prompt < self.min_prefix:
            return 0, 0
        read, self.longest = min(self.longest, prompt), max(self.longest, prompt)
        return read, prompt - read


class TestCache:
    """With and without a prompt cache."""

    @pytest.mark.parametrize("samples", [1, 3, 10])
    @pytest.mark.parametrize("min_prefix", [0, 2048, 100_000])
    def test_request_by_request(self, samples, min_prefix):
        """The forecast is the sum over requests, asked one after the other, priced one by one."""
        length, chunks, prompt = 5500, 10, 300
        result = forecast(
            prompt_tokens=prompt,
            trajectory_length=length,
            samples_per_request=samples,
            price=PRICE,
            min_cached_prefix=min_prefix,
            asked_per_token=1.0,
        ).trajectory
        requests = math.ceil(10 / samples)
        totals = {"no_cache": 0.0, "chunk_cache": 0.0, "trajectory_cache": 0.0}
        cached = dict.fromkeys(totals, 0)
        trajectory = SimulatedCache(min_prefix)
        for j in range(chunks):
            prefix = prompt + 500 * (j + 1)
            chunk = SimulatedCache(min_prefix)
            for _ in range(requests):
                for name, cache in (("no_cache", None), ("chunk_cache", chunk), ("trajectory_cache", trajectory)):
                    read, written = (0, 0) if cache is None else cache.ask(prefix)
                    if name == "chunk_cache" and requests == 1:
                        read = written = 0  # nobody would read it
                    cached[name] += read
                    totals[name] += (prefix - read - written) * 1.0 + read * 0.1 + written * 1.25
        for name, total in totals.items():
            assert getattr(result, name).cached_tokens == pytest.approx(cached[name])
            assert getattr(result, name).usd == pytest.approx((total + 5_000 * 5.0) / 1e6)

    def test_price_without_cache(self):
        """Where cached tokens cost as much as others, a cache changes nothing."""
        result = forecast(**PAPER, price=Price(1.0, 5.0), samples_per_request=1).trajectory
        assert result.trajectory_cache.usd == pytest.approx(result.no_cache.usd)
        assert result.trajectory_cache.cached_tokens > 0

    def test_tiers(self):
        """Requests with a long prompt are priced as such, the others of the same trajectory are not."""
        price = price_of("gemini", "gemini-2.5-pro")
        result = forecast(prompt_tokens=150_000, trajectory_length=110_000, price=price, asked_per_token=1.0)
        prompts = [150_000 + 10_000 * (j + 1) for j in range(10)]
        usd = sum(price.cost(Usage(prompt, 0, 500)) for prompt in prompts)
        assert result.trajectory.no_cache.usd == pytest.approx(usd)
        assert {price.at(prompt).input for prompt in prompts} == {1.25, 2.5}

    def test_no_price(self):
        """Without a price there are tokens and no dollars."""
        result = forecast(**PAPER)
        assert result.run.no_cache.usd is None
        assert result.sft_run.trajectory_cache.usd is None

    def test_agrees_with_the_budget(self):
        """A budget that settles the forecast's requests has spent the forecast's dollars."""
        result = forecast(
            prompt_tokens=300, trajectory_length=5500, asked_per_token=1.0, price=PRICE, samples_per_request=1
        ).trajectory
        budget = Budget(price=PRICE)
        for j in range(10):
            for _ in range(10):
                budget.add(Usage(300 + 500 * (j + 1), 0, 50))
        assert budget.usd_spent == pytest.approx(result.no_cache.usd)
        assert budget.tokens_spent == pytest.approx(result.prompt_tokens + result.completion_tokens)


class TestTable8:
    """The paper's Table 8, which its formulas do not give."""

    @pytest.mark.parametrize("row", TABLE_8)
    def test_doubled(self, row):
        """Twice the printed N at twenty samples per request reproduces every cell."""
        assert all(row.cells(row.doubled()).values())

    @pytest.mark.parametrize("row", TABLE_8)
    def test_as_printed(self, row):
        """N as printed gives half the output in every row, and the input only where N is 10."""
        reading = row.as_printed()
        assert reading.trajectory.completion_tokens == pytest.approx(row.completion_tokens / 2)
        assert row.cells(reading) == {"input": row.num_rollouts == 10, "output": False, "effort": False}

    @pytest.mark.parametrize("row", TABLE_8)
    def test_effort_column(self, row):
        """The last column follows from the two before it, at 8.3 prefilled tokens per decoded one."""
        sft = 8000 + 200 / DECODE_TO_PREFILL
        effort = (row.completion_tokens + row.prompt_tokens / DECODE_TO_PREFILL) / sft
        assert effort == pytest.approx(row.relative_effort, abs=0.005)

    @pytest.mark.parametrize("row", TABLE_8)
    def test_one_sample(self, row):
        """One sample per request takes N times the input, and no cell is the paper's."""
        once, each = row.as_printed().trajectory, row.one_sample()
        assert each.trajectory.prompt_tokens == pytest.approx(row.num_rollouts * once.prompt_tokens)
        assert not any(row.cells(each).values())

    def test_page(self, capsys):
        """The tables of the page are those that the command prints."""
        main()
        printed = capsys.readouterr().out
        page = (ROOT / "docs" / "table8.md").read_text(encoding="utf-8")
        assert "doubled: 21 of 21 cells as printed" in printed
        assert "as_printed: 5 of 21 cells as printed" in printed
        for name in ("as_printed", "doubled", "one_sample"):
            assert table(name) in printed
            assert table(name) in page
