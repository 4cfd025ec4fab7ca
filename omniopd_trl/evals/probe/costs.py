# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""What a teacher answered in a probe, and what a trajectory and a run cost, from its audits and their records."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from omniopd_trl.accounting.forecast import least_stopped_share
from omniopd_trl.accounting.pricing import Price
from omniopd_trl.accounting.usage import Usage
from omniopd_trl.audits.types import Audit
from omniopd_trl.evals.probe.measurement import Measured
from omniopd_trl.evals.probe.verdict import Form
from omniopd_trl.journal.browse import AuditedTrajectory
from omniopd_trl.teachers.base import OUTCOMES, REQUEST_MILLISECONDS

# Rollouts that a probe asks for at each fork. Two show how much they differ, which a single greedy one does not.
ROLLOUTS_OF_A_FORK = 2

# An audit, and the record of what it cost.
Row = tuple[Audit, AuditedTrajectory]


def answers_of(rows: Sequence[Row], has_marks: bool) -> dict[str, Any]:
    """Counts of samples, latency and cache of the teacher.

    Args:
        rows: the audits.
        has_marks: whether the teacher was asked for marks. A sample is then that of a trajectory, and else of a fork.

    Returns:
        `samples` that were asked for; with marks, `marked` trajectories and `malformed` answers; a count for each
        name in `OUTCOMES`; `short` rollouts; `seconds_per_request`, `None` without a request; the share `cached` of
        the prompt tokens; and the names of the `models` that answered.
    """
    outcomes: Counter[str] = Counter()
    for _, record in rows:
        outcomes.update(record.outcomes)
    usage, requests = _usage(rows), outcomes["requests"]
    samples, marks = _num_forks(rows) * ROLLOUTS_OF_A_FORK, {}
    if has_marks:
        samples = sum(bool(audit.num_dropped or audit.chunks) for audit, _ in rows)
        marks = {"marked": _num_marked(rows), "malformed": outcomes["malformed"]}
    return {
        "samples": samples,
        **marks,
        **{name: outcomes[name] for name in OUTCOMES},
        "short": sum(audit.num_short for audit, _ in rows),
        "seconds_per_request": outcomes[REQUEST_MILLISECONDS] / 1000 / requests if requests else None,
        "cached": usage.cached_tokens / usage.prompt_tokens if usage.prompt_tokens else 0.0,
        "models": sorted({name for audit, _ in rows for name in audit.models}),
    }


def costs_of(
    rows: Sequence[Row],
    measured: Measured | None,
    form: Form,
    options: Mapping[str, Any],
    price: Price | None,
    samples_per_request: int | None,
    trajectories: int,
) -> dict[str, Any]:
    """Tokens and dollars of a trajectory and of the run, for the recipe and for the recommended options.

    Args:
        rows: the audits.
        measured: their numbers; `None` if there are none.
        form: the settings of the recipe.
        options: the recommended options, by name.
        price: price of the teacher; `None` where it is free or not known.
        samples_per_request: as the teacher is known to support; `None` if one request returns all samples.
        trajectories: trajectories of the run.

    Returns:
        `trajectories`, and the costs of a trajectory and in dollars those of the run as `recipe` and `recommended`, as
        far as they are known. With marks also the costs of a trajectory with marks as `marked`, and for a cascade the
        number of `rollouts` per trajectory, which are in no price. Empty without a fork.
    """
    if measured is None or not _num_forks(rows):
        return {}
    if form.signal == "rollouts":
        costs = _costs_of_rollouts(rows, measured, form, options, price, samples_per_request)
    else:
        costs = _costs_of_marks(rows, measured, form, price)
    for name in {"recipe", "recommended"} & costs.keys():
        usd = costs[name]["usd"]
        costs[name]["run_usd"] = None if usd is None else usd * trajectories
    return {"trajectories": trajectories, **costs}


def _costs_of_rollouts(
    rows: Sequence[Row],
    measured: Measured,
    form: Form,
    options: Mapping[str, Any],
    price: Price | None,
    samples_per_request: int | None,
) -> dict[str, Any]:
    usage, forks = _usage(rows), _num_forks(rows)
    # A local teacher counts no requests: it reads the text before a fork once.
    requests = sum(record.outcomes.get("requests", 0) for _, record in rows) or forks
    chunks = measured.asked_per_trajectory if form.num_branches else measured.chunks_per_trajectory
    forms = {"recipe": (chunks, form.num_rollouts, form.first_rollouts)}
    if options.get("signal") == "rollouts":
        samples, first = (options.get(name, getattr(form, name)) for name in ("num_rollouts", "first_rollouts"))
        forms["recommended"] = (measured.asked_per_trajectory, samples, first)
    costs = {}
    for name, (chunks, samples, first) in forms.items():
        going = 1 - least_stopped_share(measured.duplicates or 0.0, first) if first else 1.0
        most = min(samples_per_request or samples, samples)
        number = chunks * (math.ceil(first / most) + going * math.ceil((samples - first) / most))
        written = chunks * (first + going * (samples - first)) * usage.completion_tokens / (forks * ROLLOUTS_OF_A_FORK)
        one = Usage(
            prompt_tokens=round(usage.prompt_tokens / requests),
            cached_tokens=round(usage.cached_tokens / requests),
            completion_tokens=round(written / number) if number else 0,
            cache_write_tokens=round(usage.cache_write_tokens / requests),
        )
        usd = None if price is None else number * price.cost(one)
        costs[name] = _cost(number * usage.prompt_tokens / requests, written, usd)
    return costs


def _costs_of_marks(rows: Sequence[Row], measured: Measured, form: Form, price: Price | None) -> dict[str, Any]:
    """The first question about a trajectory, as a run with branches asks it.

    A recipe without branches asks for fewer marks: what was measured is the price of the recommended options.
    """
    usage = _usage(rows)
    usd = None if price is None else sum(record.usd or 0.0 for _, record in rows)
    costs: dict[str, Any] = {}
    for name, number in (("recipe" if form.num_branches else "recommended", len(rows)), ("marked", _num_marked(rows))):
        if number:
            each = None if usd is None else usd / number
            costs[name] = _cost(usage.prompt_tokens / number, usage.completion_tokens / number, each)
    if form.signal == "cascade" and measured.middling is not None:
        costs["rollouts"] = measured.middling * measured.asked_per_trajectory * form.num_rollouts
    return costs


def _cost(prompt_tokens: float, completion_tokens: float, usd: float | None) -> dict[str, float | None]:
    """Of a trajectory."""
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "usd": usd}


def _usage(rows: Sequence[Row]) -> Usage:
    return sum((record.usage for _, record in rows), Usage())


def _num_forks(rows: Sequence[Row]) -> int:
    """Forks that the teacher was asked about."""
    return sum(audit.num_dropped + len(audit.chunks) for audit, _ in rows)


def _num_marked(rows: Sequence[Row]) -> int:
    return sum(bool(audit.chunks) for audit, _ in rows)
