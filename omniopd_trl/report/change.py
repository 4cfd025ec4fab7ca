# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""One audited chunk of the first and one of the last step of a run, for the end of training."""

from omniopd_trl.journal.browse import AuditPlace, read_audits
from omniopd_trl.report.runs import Run
from omniopd_trl.report.terminal import AuditedChunk, chunks_of

# Trajectories of a step that are read: the step may have thousands.
_MOST = 200


def first_and_last(run: Run) -> tuple[AuditedChunk, AuditedChunk] | None:
    """The chunk at the lower quartile of the posterior, of the first and of the last recorded step.

    A quarter of the chunks of the step have a lower posterior. Both chunks have the same rank, so the second one has a
    higher posterior only when the student agrees more often with the teacher.

    Returns:
        Both chunks; `None` when fewer than two steps have one.
    """
    steps = sorted({place.step for place in run.places if place.low is not None})
    if len(steps) < 2:
        return None
    first, last = (
        _lower_quartile(run, [place for place in run.places if place.step == step and place.low is not None])
        for step in (steps[0], steps[-1])
    )
    return first, last


def _lower_quartile(run: Run, places: list[AuditPlace]) -> AuditedChunk:
    some = places[:: -(-len(places) // _MOST)]
    ordered = sorted(chunks_of(read_audits(run.folder, some)), key=lambda audited: audited.chunk.posterior)
    return ordered[(len(ordered) - 1) // 4]
