# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""One audited chunk of the first and one of the last step of a run, for the end of training."""

from operator import attrgetter

from omniopd_trl.journal.browse import AuditPlace, read_audits
from omniopd_trl.report.runs import Run
from omniopd_trl.report.terminal import AuditedChunk, chunks_of

# Limits of what is read: trajectories of a step, which may have thousands, and steps, which may be without a chunk.
_TRAJECTORIES, _STEPS = 200, 5


def first_and_last(run: Run) -> tuple[AuditedChunk, AuditedChunk] | None:
    """The chunk at the lower quartile of the posterior, of the first and of the last step with audited chunks.

    A quarter of the chunks of the step have a lower posterior. Both chunks have the same rank, so the second one has a
    higher posterior only when the student agrees more often with the teacher. With branches, advantages are compared.

    Returns:
        Both chunks; `None` when there is only one step.
    """
    by_step: dict[int, list[AuditPlace]] = {}
    for place in run.places:
        by_step.setdefault(place.step, []).append(place)
    steps = list(by_step)
    first, last = (
        next((chunk for step in some[:_STEPS] if (chunk := _lower_quartile(run, by_step[step])) is not None), None)
        for some in (steps, steps[::-1])
    )
    if first is None or last is None or first.trajectory.step == last.trajectory.step:
        return None
    return first, last


def _lower_quartile(run: Run, places: list[AuditPlace]) -> AuditedChunk | None:
    some = places[:: -(-len(places) // _TRAJECTORIES)]
    ordered = sorted(chunks_of(read_audits(run.folder, some)), key=attrgetter("preference"))
    return ordered[(len(ordered) - 1) // 4] if ordered else None
