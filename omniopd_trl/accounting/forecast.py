# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Forecast of the tokens and dollars that a run needs from its teacher, before any request.

The forecast is arithmetic on the settings of a run. It loads no model and sends no request.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from omniopd_trl.accounting.pricing import Price
from omniopd_trl.errors import ConfigError

# The paper's cost of a decoded token, in prefilled tokens (section 9).
DECODE_TO_PREFILL = 8.3

# Tokens that a judge writes for a mark: its number, the mark, and what is between them.
TOKENS_PER_MARK = 5


@dataclass(frozen=True)
class Cache:
    """Effect of a prompt cache on a number of requests.

    Attributes:
        cached_tokens: prompt tokens that are read from the cache.
        written_tokens: prompt tokens that are written to the cache.
        usd: dollars of all requests, completions included. `None` without a price.
    """

    cached_tokens: float
    written_tokens: float
    usd: float | None

    def times(self, number: float) -> "Cache":
        """The same for `number` times as many requests."""
        usd = None if self.usd is None else self.usd * number
        return Cache(self.cached_tokens * number, self.written_tokens * number, usd)


@dataclass(frozen=True)
class Load:
    """Load on the teacher, in teacher tokens. Values are averages and need not be integers.

    Attributes:
        requests: number of requests, without retries.
        prompt_tokens: prompt tokens (prefill), cached ones included.
        completion_tokens: generated tokens (decode).
        kept_tokens: generated tokens that are compared with a chunk. More are requested, since the tokenizers of
            teacher and student differ. A mark counts as one.
        no_cache: cost without a prompt cache.
        chunk_cache: cost if the requests of one chunk share their prompt: the first writes it to the cache, and the
            others read it. Equals `no_cache` if one request returns all samples.
        trajectory_cache: cost if a chunk also reads the cached prompt of the chunk before it. This is the best case: a
            service whose cache becomes readable late saves less.
    """

    requests: float
    prompt_tokens: float
    completion_tokens: float
    kept_tokens: float
    no_cache: Cache
    chunk_cache: Cache
    trajectory_cache: Cache

    def times(self, number: float) -> "Load":
        """The same for `number` times as many requests."""
        return Load(
            self.requests * number,
            self.prompt_tokens * number,
            self.completion_tokens * number,
            self.kept_tokens * number,
            self.no_cache.times(number),
            self.chunk_cache.times(number),
            self.trajectory_cache.times(number),
        )

    @property
    def effort(self) -> float:
        """Work of the teacher in decoded tokens, if decoding one costs as much as prefilling `DECODE_TO_PREFILL`."""
        return self.completion_tokens + self.prompt_tokens / DECODE_TO_PREFILL


@dataclass(frozen=True)
class Forecast:
    """Load on the teacher by a run.

    Attributes:
        trajectory: load of the audit of one trajectory.
        step: load of one optimizer step.
        run: load of all steps.
        sft_prompt: load of the complete solutions of one prompt by the teacher, as SFT needs them.
        sft_run: load of the solutions of each distinct prompt of the run.
    """

    trajectory: Load
    step: Load
    run: Load
    sft_prompt: Load
    sft_run: Load

    @property
    def relative_effort(self) -> float:
        """Effort of auditing a trajectory relative to one teacher solution (last column of the paper's Table 8)."""
        return self.trajectory.effort / self.sft_prompt.effort


def forecast(
    *,
    prompt_tokens: float | Sequence[float],
    trajectory_length: float,
    num_chunks: int = 10,
    chunk_length: int = 50,
    min_chunk_length: int = 8,
    num_rollouts: int = 10,
    samples_per_request: int | None = None,
    tokens_per_token: float = 1.0,
    asked_per_token: float = 1.4,
    prompt_overhead: float = 0.0,
    chunks_per_trajectory: float | None = None,
    rollout_tokens: float | None = None,
    price: Price | None = None,
    min_cached_prefix: float = 0.0,
    prompts_per_step: int = 1,
    steps: int = 1,
    num_prompts: int | None = None,
    solution_length: float | None = None,
    num_solutions: int = 1,
    judge_marks: int = 0,
    judge_overhead: float = 0.0,
    rollout_share: float = 1.0,
    first_rollouts: int = 0,
    stopped_share: float = 0.0,
) -> Forecast:
    r"""Forecast the tokens and dollars of audits, with the paper's formulas (Section 9).

    Decode is `M * N * C`, prefill `ceil(N / k) * M * (prompt + L / 2)` with `k` samples per request. Chunks start
    evenly over the trajectory, so their prefixes have `L / 2` tokens on average. With `k = N` this is the paper's
    formula.

    Logged values of a run can replace two assumptions: the chunks per trajectory (`chunks_per_trajectory`) and the
    generated tokens per rollout (`rollout_tokens`). Merged chunks (`chunk_overlap="merge"`) and hidden reasoning have
    no formula and need these logged values.

    Not included: retries after errors, evaluation by or of the teacher, and the single request of the probe.

    Args:
        prompt_tokens: length of the prompts, in student tokens: their mean, or one value for each.
        trajectory_length: `L`, in student tokens: an assumption or the measured mean.
        num_chunks: `M`. A trajectory without room for `M` chunks has fewer, and one shorter than a chunk has one.
        chunk_length: `C`, in student tokens.
        min_chunk_length: a trajectory shorter than this has no chunk.
        num_rollouts: `N`.
        samples_per_request: `k`. `None` if one request returns all `N`.
        tokens_per_token: mean number of teacher tokens per student token. 1.0 assumes tokenizers of similar vocabulary
            size.
        asked_per_token: requested teacher tokens per token of the chunk. The teacher generates and charges all of them
            unless its answer ends earlier, and the surplus is cut off. 1.0 is the paper's formula.
        prompt_overhead: teacher tokens that a template or an instruction adds to each prompt.
        chunks_per_trajectory: mean number of requested chunks per trajectory, at most `num_chunks`. Defaults to the
            number that fits into a trajectory of mean length.
        rollout_tokens: mean number of tokens that the teacher generates and charges per rollout. Defaults to all
            requested tokens.
        price: price of the teacher. `None` forecasts tokens only.
        min_cached_prefix: shortest prompt that the service caches, in teacher tokens.
        prompts_per_step: prompts of an optimizer step, over all processes.
        steps: optimizer steps.
        num_prompts: distinct prompts of the run. Defaults to the number of its trajectories (one epoch).
        solution_length: length of a solution by the teacher, in student tokens. Defaults to `trajectory_length`.
        num_solutions: solutions per prompt that SFT needs.
        judge_marks: marks that a judge gives for each chunk, with one request per trajectory, which reads all of it. 0
            without a judge. The texts of more than one mark per chunk are read in addition.
        judge_overhead: teacher tokens that the question to the judge adds to its prompt, with its tags.
        rollout_share: share of the chunks for which rollouts are asked for: 0 with a judge alone, and with a cascade
            the share of middling marks.
        first_rollouts: rollouts that are requested first, at least 2 and fewer than `num_rollouts`. 0 requests all at
            once.
        stopped_share: share of these chunks that get no more rollouts, since the first ones are equal. 0 is the upper
            bound.

    Returns:
        The load of a trajectory, a step and the run, and of SFT on teacher solutions.

    Raises:
        ConfigError: when a number is out of range.

    Example:
        >>> audit = forecast(prompt_tokens=200, trajectory_length=6340, asked_per_token=1.0).trajectory
        >>> audit.prompt_tokens, audit.completion_tokens
        (33700.0, 5000.0)

    Reference: Section 9.
    """
    lengths = [prompt_tokens] if isinstance(prompt_tokens, int | float) else list(prompt_tokens)
    if not lengths:
        raise ConfigError("`prompt_tokens` is empty. Give the length of at least one prompt.")
    samples = num_rollouts if samples_per_request is None else samples_per_request
    solution = trajectory_length if solution_length is None else solution_length
    for name, value, least in (
        ("num_chunks", num_chunks, 1),
        ("chunk_length", chunk_length, 1),
        ("num_rollouts", num_rollouts, 1),
        ("samples_per_request", samples, 1),
        ("prompts_per_step", prompts_per_step, 1),
        ("steps", steps, 0),
        ("num_prompts", 0 if num_prompts is None else num_prompts, 0),
        ("prompt_tokens", min(lengths), 0),
        ("trajectory_length", trajectory_length, 1),
        ("solution_length", solution, 1),
        ("num_solutions", num_solutions, 1),
        ("tokens_per_token", tokens_per_token, 0),
        ("asked_per_token", asked_per_token, tokens_per_token),
        ("prompt_overhead", prompt_overhead, 0),
        ("rollout_tokens", 0 if rollout_tokens is None else rollout_tokens, 0),
        ("min_cached_prefix", min_cached_prefix, 0),
        ("judge_marks", judge_marks, 0),
        ("judge_overhead", judge_overhead, 0),
        ("rollout_share", rollout_share, 0),
        ("stopped_share", stopped_share, 0),
    ):
        if not least <= value < math.inf:
            raise ConfigError(f"{name}={value} must be a number of at least {least}.")
    if first_rollouts and not 2 <= first_rollouts < num_rollouts:
        raise ConfigError(f"first_rollouts={first_rollouts} must be at least 2, and below {num_rollouts=}.")

    chunks: float
    if trajectory_length >= chunk_length:
        chunks, length = min(num_chunks, int(trajectory_length // chunk_length)), float(chunk_length)
    else:
        chunks, length = int(trajectory_length >= min_chunk_length), float(trajectory_length)
    if chunks_per_trajectory is not None:
        if not 0 <= chunks_per_trajectory <= num_chunks:
            raise ConfigError(
                f"chunks_per_trajectory={chunks_per_trajectory} must be between 0 and num_chunks={num_chunks}: no "
                "trajectory has more."
            )
        chunks = chunks_per_trajectory
    per_rollout = math.ceil(asked_per_token * length) if rollout_tokens is None else rollout_tokens
    kept_per_rollout = min(tokens_per_token * length, per_rollout)
    # Kinds of chunks: their share, requests and rollouts.
    first = math.ceil(first_rollouts / samples)
    kinds = [(1.0 - stopped_share, first + math.ceil((num_rollouts - first_rollouts) / samples), num_rollouts)]
    if stopped_share:
        kinds.append((stopped_share, first, first_rollouts))

    # A fractional mean is a mixture of trajectories with the next smaller and the next larger number of chunks.
    fewer = int(chunks)
    mixture = [(fewer, 1 - (chunks - fewer)), (fewer + 1, chunks - fewer)]
    audits, solutions = _Sum(price), _Sum(price)
    for prompt, count in Counter(lengths).items():
        for number, share in mixture:
            before: float | None = None  # cached prompt tokens of the previous chunk
            for j in range(number if share else 0):
                # Expected order statistics of uniform points. Their mean is L / 2 for any number of points.
                start = trajectory_length * (j + 1) / (number + 1)
                prefix = prompt_overhead + tokens_per_token * (prompt + start)
                cached = prefix >= min_cached_prefix
                for of_kind, requests, rollouts in kinds:
                    written, kept = rollouts * per_rollout, rollouts * kept_per_rollout
                    audits.add(
                        rollout_share * share * count * of_kind, prefix, requests, written, kept, cached, before
                    )
                before = prefix if cached else None
            if judge_marks and number and share:
                marks = judge_marks * number
                candidates = marks * length if judge_marks > 1 else 0.0
                question = judge_overhead + tokens_per_token * (prompt + trajectory_length + candidates)
                audits.add(share * count, question, 1, TOKENS_PER_MARK * marks, marks, False, None)
        written = num_solutions * tokens_per_token * solution
        calls = math.ceil(num_solutions / samples)
        solutions.add(count, tokens_per_token * prompt, calls, written, written, False, None)
    trajectory, sft_prompt = audits.mean(len(lengths)), solutions.mean(len(lengths))
    step = trajectory.times(prompts_per_step)
    distinct = steps * prompts_per_step if num_prompts is None else num_prompts
    return Forecast(trajectory, step, step.times(steps), sft_prompt, sft_prompt.times(distinct))


def least_stopped_share(duplicates: float, first_rollouts: int) -> float:
    """The share of chunks whose first rollouts are all equal is at least this, `duplicates^(first_rollouts - 1)`.

    Args:
        duplicates: share of pairs of rollouts of a chunk that are equal, `d = E sum_v p_v^2` over chunks, where the
            texts v of a chunk have the probabilities p_v. By Jensen's inequality, `E sum_v p_v^n >= d^(n - 1)`.
        first_rollouts: n.
    """
    return duplicates ** (first_rollouts - 1)


class _Sum:
    """Adds up the requests of chunks."""

    def __init__(self, price: Price | None) -> None:
        self.price = price
        self.totals = [0.0] * 4
        self.caches = [[0.0] * 3 for _ in range(3)]

    def add(
        self,
        count: float,
        prompt: float,
        requests: int,
        completion: float,
        kept: float,
        cached: bool,
        before: float | None,
    ) -> None:
        """Add `count` chunks. Each sends `requests` requests with the same prompt, for `completion` tokens."""
        for index, value in enumerate((requests, requests * prompt, completion, kept)):
            self.totals[index] += count * value
        siblings = (requests - 1) * prompt if cached else 0.0
        written = prompt if cached else 0.0
        # No cache; a cache shared by the requests of a chunk; one that the previous chunk has also filled in part.
        kinds = (
            (0.0, 0.0),
            (siblings, written if requests > 1 else 0.0),
            (siblings + (before or 0.0), written - (before or 0.0)),
        )
        rates = None if self.price is None else self.price.at(prompt)
        for cache, (read, new) in zip(self.caches, kinds, strict=True):
            cache[0] += count * read
            cache[1] += count * new
            if rates is not None:
                cache[2] += count * rates.dollars(requests * prompt, read, new, completion)

    def mean(self, number: int) -> Load:
        """The mean over `number` prompts."""
        caches = [Cache(read, new, None if self.price is None else usd) for read, new, usd in self.caches]
        requests, prompt, completion, kept = self.totals
        return Load(requests, prompt, completion, kept, *caches).times(1 / number)
