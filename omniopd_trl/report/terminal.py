# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Audits in the terminal: what the student wrote, and what the teacher wrote in the same place."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from omniopd_trl.journal.browse import AuditedTrajectory, ShownChunk, preference_of
from omniopd_trl.report.runs import facts_of, text_of_prompt, visible

# Characters of the student's text that are shown before a chunk, and of the prompt.
CONTEXT, PROMPT = 240, 600


@dataclass(frozen=True)
class AuditedChunk:
    """A chunk, with the trajectory that it is a part of.

    Attributes:
        trajectory: the trajectory.
        number: index of the chunk in it.
    """

    trajectory: AuditedTrajectory
    number: int

    @property
    def chunk(self) -> ShownChunk:
        return self.trajectory.chunks[self.number]

    @property
    def preference(self) -> float:
        """What chunks are ordered by; see [`~omniopd_trl.journal.browse.preference_of`]."""
        return preference_of(self.chunk)

    @property
    def order(self) -> str:
        """What it is called."""
        return "advantage" if self.chunk.branches else "posterior"


def chunks_of(trajectories: Iterable[AuditedTrajectory]) -> Iterator[AuditedChunk]:
    """All chunks of the trajectories."""
    for trajectory in trajectories:
        for number in range(len(trajectory.chunks)):
            yield AuditedChunk(trajectory, number)


def as_json(audited: AuditedChunk) -> dict[str, Any]:
    """A chunk as plain data, for `--json` and `--jsonl`."""
    trajectory, chunk = audited.trajectory, audited.chunk
    return {
        "step": trajectory.step,
        "rank": trajectory.rank,
        "index": trajectory.index,
        "chunk": audited.number,
        "teacher": trajectory.teacher,
        "prompt": trajectory.prompt,
        "teacher_context": trajectory.teacher_context,
        "context": chunk.prefix,
        "student": chunk.text,
        "start": chunk.start,
        "end": chunk.end,
        "anchor": chunk.anchor,
        "rollouts": [
            {"text": text, "count": count, "similarity": similarity}
            | ({"imitated": chunk.imitated_of(text)} if chunk.imitated else {})
            for text, count, similarity in chunk.distinct_rollouts()
        ],
        "k_sem": sum(chunk.similarities),
        "num_rollouts": len(chunk.rollouts),
        "mark": chunk.mark,
        "prior": chunk.prior,
        "posterior": chunk.posterior,
        "weight": chunk.weight,
        "branches": [
            {"text": branch.text, "count": count, "similarity": branch.similarity, "advantage": branch.advantage}
            for branch, count in chunk.distinct_branches()
        ],
        "trajectory_usage": asdict(trajectory.usage),
        "trajectory_usd": trajectory.usd,
        "trajectory_chunks": len(trajectory.chunks),
        "trajectory_dropped_chunks": trajectory.num_dropped,
        "trajectory_set_aside_rollouts": trajectory.num_set_aside,
        "trajectory_outcomes": dict(trajectory.outcomes),
        "trajectory_failures": list(trajectory.failures),
        "trajectory_judge_answers": list(trajectory.answers),
        "trajectory_verified": trajectory.verified,
        "models": list(trajectory.models),
    }


class HasPieces(Protocol):
    """Knows the text of each token of a completion, as [`~omniopd_trl.report.runs.Run`] does."""

    @property
    def control(self) -> str | None: ...

    def pieces(self, trajectory: AuditedTrajectory) -> list[str]: ...


def print_audits(run: HasPieces, chunks: Iterable[AuditedChunk], console: Console) -> None:
    """Print one panel per chunk.

    Texts of models may hold control characters, which a terminal would obey. They are escaped.
    """
    if run.control is not None:
        console.print(run.control, highlight=False)
    for audited in chunks:
        console.print(_panel(run, audited))


def _panel(run: HasPieces, audited: AuditedChunk) -> Panel:
    trajectory, chunk = audited.trajectory, audited.chunk
    fork = chunk.fork(run.pieces(trajectory))
    context = Text(_end(chunk.prefix, CONTEXT), style="dim")
    student = Text.assemble((visible(chunk.text[:fork]), "bold"), ("▏", "cyan"), (visible(chunk.text[fork:]), "bold"))
    rollouts = Table(box=None, pad_edge=False, header_style="dim")
    columns = [("times", "right"), ("similarity", "right"), ("the teacher wrote", "left")]
    for name, justify in columns + [("imitated", "left")] * bool(chunk.imitated):
        rollouts.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for text, count, similarity in chunk.distinct_rollouts():
        style = "green" if similarity >= 0.99 else "red" if similarity <= 0.01 else ""
        imitated = [_quoted(chunk.imitated_of(text))] if chunk.imitated else []
        rollouts.add_row(str(count), f"{similarity:.3f}", Text(visible(text), style=style), *imitated)
    marked = chunk.mark is not None and not chunk.rollouts
    branches = Table(box=None, pad_edge=False, header_style="dim")
    for name, justify in (
        ("times", "right"),
        ("mark" if marked else "similarity", "right"),
        ("advantage", "right"),
        ("the student", "left"),
    ):
        branches.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for branch, count in chunk.distinct_branches():
        style = "green" if branch.advantage > 0 else "red" if branch.advantage < 0 else ""
        numbers = (str(count), f"{branch.similarity:.3f}", f"{branch.advantage:+.3f}")
        branches.add_row(*numbers, Text(visible(branch.text), style=style))
    weight = "" if chunk.weight is None else f"   weight {chunk.weight:+.3f}"
    mark = "" if chunk.mark is None else f"mark {chunk.mark:.3f}   "
    k_sem = "" if marked else f"k_sem {sum(chunk.similarities):.3f} of {len(chunk.similarities)}   "
    summary = f"{mark}{k_sem}prior {chunk.prior:.3f}   posterior {chunk.posterior:.3f}{weight}"
    number = len(trajectory.chunks)
    whole = f"its trajectory: {number} chunk{'s' * (number != 1)}, {', '.join(facts_of(trajectory))}"
    seen = trajectory.teacher_context
    only_teacher = () if seen is None else (Text(f"only the teacher saw: {_end(seen, PROMPT)}", style="dim"),)
    body = Group(
        Text(_end(text_of_prompt(trajectory.prompt), PROMPT), style="italic"),
        *only_teacher,
        Text(),
        Text.assemble(context, student),
        Text(),
        *(() if marked else (rollouts, Text())),
        *((branches, Text()) if chunk.branches else ()),
        Text(summary),
        Text(visible(whole), style="dim"),
        *(
            Text(f"the judge wrote: {visible(' | '.join(answer.splitlines()))}", style="dim")
            for answer in trajectory.answers
        ),
        *(Text(f"missing: {visible(failure)}", style="dim") for failure in trajectory.failures),
    )
    title = (
        f"step {trajectory.step}, process {trajectory.rank}, trajectory {trajectory.index}, chunk {audited.number + 1}"
    )
    return Panel(body, title=title, title_align="left")


def _quoted(imitated: str | None) -> Text:
    """What is imitated of a rollout, with its white space."""
    return Text("left out", style="dim") if imitated is None else Text(repr(imitated))


def _end(text: str, length: int) -> str:
    text = visible(text)
    return text if len(text) <= length else f"…{text[-length:]}"
