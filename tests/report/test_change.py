# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The chunks of the first and of the last step, which `omniopd train` shows at its end."""

import logging

import pytest

from omniopd_trl.audits.types import Audit, Branch, ChunkAudit
from omniopd_trl.cli.train import print_change
from omniopd_trl.method.chunks import Chunk
from omniopd_trl.report.change import first_and_last
from omniopd_trl.report.runs import Run
from tests.support.journals import journal, trajectory


def record(folder, posteriors, branched=False):
    """A run whose steps have chunks with these posteriors, two to a trajectory. Advantages are their negatives."""
    with journal(folder, num_processes=1) as j:
        for step, of_step in enumerate(posteriors):
            pairs = [of_step[i : i + 2] for i in range(0, len(of_step), 2)] or [[]]
            j.record_trajectories(step, [trajectory() for _ in pairs])
            for index, pair in enumerate(pairs):
                chunks = [
                    ChunkAudit(
                        *(Chunk(k, k + 1, k), "", f"text {posterior}", ("x",), (0.5,), 0.5, posterior),
                        branches=(Branch((1,), "x", advantage=-posterior), Branch((2,), "y")) * branched,
                    )
                    for k, posterior in enumerate(pair)
                ]
                j.record(step, index, Audit(tuple(chunks)))
    return Run(folder)


@pytest.mark.parametrize(
    ("posteriors", "branched", "shown"),
    [
        ([[0.9, 0.1, 0.5, 0.7, 0.3], [0.2], [0.6, 0.4, 0.8, 1.0]], False, (0.3, 0.4)),
        ([[0.9, 0.1, 0.5, 0.7, 0.3], [0.2], [0.6, 0.4, 0.8, 1.0]], True, (0.7, 1.0)),  # by the advantage
        ([[], [0.5], [0.25], []], False, (0.5, 0.25)),  # the steps at both ends have no chunk
        ([[0.5, 0.4]], False, None),
        ([[], []], False, None),
    ],
)
def test_rank(tmp_path, posteriors, branched, shown):
    """The lower quartile of both steps, better or worse; nothing to compare with a single step."""
    chunks = first_and_last(record(tmp_path, posteriors, branched))
    assert (chunks and tuple(audited.chunk.posterior for audited in chunks)) == shown


def test_printed(tmp_path, capsys, caplog):
    """Both panels. A folder that cannot be read is a warning: the run has ended well."""
    record(tmp_path / "run", [[0.5], [0.25]])
    print_change(str(tmp_path / "run"))
    printed = capsys.readouterr().out
    assert "A chunk of the first step and one of the last" in printed
    assert printed.index("text 0.5") < printed.index("text 0.25")
    with caplog.at_level(logging.WARNING):
        print_change(str(tmp_path / "other"))
    assert "No audited chunk can be shown (DataError: " in caplog.text
    assert capsys.readouterr().out == ""
