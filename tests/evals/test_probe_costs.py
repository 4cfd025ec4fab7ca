# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""What a probe's teacher answered, and what a run costs, calculated by hand."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from omniopd_trl.accounting.pricing import Price
from omniopd_trl.accounting.usage import Usage
from omniopd_trl.audits.types import Audit, ChunkAudit
from omniopd_trl.evals.probe import Form, Measured
from omniopd_trl.evals.probe.costs import answers_of, costs_of
from omniopd_trl.journal.browse import AuditedTrajectory
from omniopd_trl.method.chunks import Chunk

CHUNK = ChunkAudit(Chunk(0, 8, 0), "", "", (), (), 0.5, 0.5)
# Four forks, of which one got nothing: 8 requests of 100 tokens read, 60 of them cached, and 5 written.
ROWS = [
    (
        Audit((CHUNK,) * chunks, num_dropped=dropped, num_short=1, models=("m",)),
        AuditedTrajectory(0, 0, index, "t", "", (), (), usage=Usage(400, 240, 20), usd=usd, outcomes=outcomes),
    )
    for index, (chunks, dropped, usd, outcomes) in enumerate(
        [
            (2, 0, 0.1, {"requests": 4, "request_milliseconds": 3000, "restarted": 1}),
            (1, 1, 0.3, {"requests": 4, "request_milliseconds": 1000, "malformed": 2}),
        ]
    )
]
NUMBERS = Measured(2, 6, 2, 4, 1, chunks_per_trajectory=3.0, asked_per_trajectory=2.0, completion_tokens=50.0)
FORM = Form(3, 5, 1, 7, 0, 1.0, 0.0, "none", "policy", False, 0.2)
PRICE = Price(1.0, 10.0, cache_read=0.5)


def costs(form=FORM, numbers=NUMBERS, options=None, price=PRICE, samples=None, rows=ROWS):
    return costs_of(rows, numbers, form, options or {}, price, samples, trajectories=10)


def test_answers():
    """A sample is one of two rollouts of a fork; with marks, the one of a trajectory."""
    rollouts, marks = answers_of(ROWS, has_marks=False), answers_of(ROWS, has_marks=True)
    assert (rollouts["samples"], rollouts["restarted"], rollouts["short"]) == (8, 1, 2)
    assert (rollouts["seconds_per_request"], rollouts["cached"], rollouts["models"]) == (0.5, 0.6, ["m"])
    assert "marked" not in rollouts
    assert (marks["samples"], marks["marked"], marks["malformed"]) == (2, 2, 2)
    assert answers_of([], has_marks=False)["seconds_per_request"] is None


def test_rollouts():
    """Two forks of a trajectory are asked for five samples each, of five tokens."""
    (trajectories, cost) = costs(samples=2).values()
    assert trajectories == 10
    assert (cost["prompt_tokens"], cost["completion_tokens"]) == (2 * 3 * 100, 2 * 5 * 5)
    # 100 tokens read, 60 of them cached, and 50 / 6 = 8 written in each request.
    assert cost["usd"] == pytest.approx(6 * (40 + 60 * 0.5 + 8 * 10) / 1e6)
    assert cost["run_usd"] == pytest.approx(10 * cost["usd"])
    assert costs(replace(FORM, num_branches=0))["recipe"]["prompt_tokens"] == 3 * 100
    assert costs(price=None)["recipe"]["run_usd"] is None
    # Half of the pairs are equal: half of the forks get no more than two.
    recommended = costs(numbers=replace(NUMBERS, duplicates=0.5), options={"signal": "rollouts", "first_rollouts": 2})
    assert recommended["recipe"]["completion_tokens"] == 50
    assert recommended["recommended"]["completion_tokens"] == 2 * (2 + 0.5 * 3) * 5
    assert recommended["recommended"]["prompt_tokens"] == 2 * 1.5 * 100


def test_marks():
    """The price is what was paid. With a cascade, the forks in the middle get rollouts beside it."""
    rows = [*ROWS, (Audit(), SimpleNamespace(usage=Usage(), usd=None, outcomes={}))]
    cost = costs(replace(FORM, signal="judge"), rows=rows)
    assert cost["recipe"]["usd"] == pytest.approx(0.4 / 3)
    assert cost["recipe"]["run_usd"] == pytest.approx(10 * 0.4 / 3)
    assert cost["marked"] == {"prompt_tokens": 400, "completion_tokens": 20, "usd": pytest.approx(0.2)}
    assert "rollouts" not in cost
    cascade = costs(replace(FORM, signal="cascade", num_branches=0), replace(NUMBERS, middling=0.25))
    assert cascade["rollouts"] == 0.25 * 2 * 5
    assert cascade["recommended"]["usd"] == pytest.approx(0.2)


def test_nothing_asked():
    assert costs(rows=[]) == costs(numbers=None) == {}
