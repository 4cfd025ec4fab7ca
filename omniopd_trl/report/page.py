# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The report of a run: one self-contained HTML file that works without a network.

Texts of models are untrusted. They are embedded as compressed data, which cannot hold markup, and the page's script
sets them as text. A content-security policy allows only the page's own script and style.
"""

import base64
import gzip
import hashlib
import html
import json
from bisect import bisect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import accumulate, groupby
from operator import itemgetter
from string import Template
from typing import Any, TypeVar

from omniopd_trl.journal.browse import AuditedTrajectory, AuditPlace, preference_of, read_audits, read_prompts
from omniopd_trl.report.figures import Figure
from omniopd_trl.report.probe import cost_rows, measured_rows, signal_rows
from omniopd_trl.report.runs import Run, facts_of, short_name, text_of_prompt, visible
from omniopd_trl.teachers.base import clean_text

T = TypeVar("T")

# Trajectories per compressed block. A click decompresses one block.
BLOCK = 10
# Entropy, in nats, from which a token has the shade of this index.
SHADES = (0.0, 0.05, 0.25, 0.75, 1.5, 2.5)
# Filters of the browser. A trajectory has one if any of its chunks or samples does.
OUTCOMES: tuple[tuple[str, Callable[[AuditedTrajectory], object]], ...] = (
    ("a rollout started over", lambda t: t.outcomes.get("restarted")),
    ("a sample was refused", lambda t: t.outcomes.get("refused") or t.outcomes.get("filtered")),
    ("a sample was empty", lambda t: t.outcomes.get("empty")),
    ("a request failed", lambda t: t.outcomes.get("failed_requests")),
    ("a chunk was dropped", lambda t: t.num_dropped),
    ("a rollout was set aside", lambda t: t.num_set_aside),
    ("a rollout was cut short", lambda t: t.num_short),
    ("no chunk was audited", lambda t: not t.chunks),
    ("a chunk has no similar rollout", lambda t: any(c.rollouts and not any(c.similarities) for c in t.chunks)),
    ("a chunk equals every rollout", lambda t: any(c.rollouts and min(c.similarities) == 1 for c in t.chunks)),
    ("an answer of the judge has no marks", lambda t: t.outcomes.get("malformed")),
    ("left out by audit_trajectories", lambda t: t.verified is not None and not t.verified["is_chosen"]),
)
MIB = 2**20


@dataclass(frozen=True)
class Section:
    """A part of the page before the audit browser.

    Attributes:
        id: its anchor.
        title: its heading.
        body: its HTML, in which every text of a run is escaped.
    """

    id: str
    title: str
    body: str


def write_page(runs: Sequence[Run], *, max_mib: float = 24.0, live: bool = False) -> str:
    """The report as HTML.

    Args:
        runs: one run, or several to compare.
        max_mib: limit of the embedded audits, in MiB. If the runs hold more, evenly spaced prompts are embedded, each
            with all its trajectories, and the page says how many were left out.
        live: whether the page asks the server that sent it for changes.

    Raises:
        DataError: when the logged metrics cannot be read.
        JournalError: when a journal is damaged.
        MissingExtraError: when matplotlib is not installed.
    """
    probes = "\n".join(filter(None, map(_probe, runs)))
    # A new section is one more entry here.
    sections = [
        Section("summary", "Summary", "\n".join(_summary(run) for run in runs)),
        *([Section("probe", "Probe", probes)] if probes else []),
        Section("dynamics", "Dynamics", _figures(runs)),
    ]
    index, blocks, left_out = _audits(runs, round(max_mib * MIB))
    audits = Template(_asset("audits.html")).substitute(
        left_out=html.escape(left_out), data="\n".join([_data("index", {**index, "live": live}), *blocks])
    )
    title = "OmniOPD: " + " and ".join(run.name for run in runs)
    return render(title, sections, audits, '<a href="#audits">Audits</a>', _asset("page.js"), is_live=live)


def render(
    title: str,
    sections: Sequence[Section],
    rest: str = "",
    links: str = "",
    script: str = "",
    *,
    is_live: bool = False,
) -> str:
    """A page of the report.

    Args:
        title: its title.
        sections: its sections, which the navigation links to.
        rest: HTML after the sections.
        links: further links of the navigation, as HTML.
        script: the only script that may run.
        is_live: whether the script may ask the server that sent the page.
    """
    style = _asset("page.css")
    values = {
        "title": escaped(title),
        "style": style,
        "style_hash": _hash(style),
        "script": script,
        "script_hash": _hash(script),
        "connect": "connect-src 'self';" if is_live else "",
        "links": " ".join([*(f'<a href="#{section.id}">{section.title}</a>' for section in sections), links]),
        "sections": "\n".join(
            f'<section id="{section.id}" aria-labelledby="{section.id}-title">\n'
            f'<h2 id="{section.id}-title">{section.title}</h2>\n{section.body}\n</section>'
            for section in sections
        ),
        "rest": rest,
        "ready": "" if script else ' data-ready="true"',  # a script says itself when the page is complete
    }
    return Template(_asset("page.html")).substitute(values)


def html_table(titles: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table whose first column names the rows. Every text is escaped."""
    # A header must not be empty.
    head = "".join(f'<th scope="col">{escaped(title)}</th>' if title else "<td></td>" for title in titles)
    body = "".join(
        f'<tr><th scope="row">{escaped(first)}</th>{"".join(f"<td>{escaped(cell)}</td>" for cell in cells)}</tr>'
        for first, *cells in rows
    )
    return f"<table>{f'<thead><tr>{head}</tr></thead>' if titles else ''}<tbody>{body}</tbody></table>"


def _asset(name: str) -> str:
    return files("omniopd_trl.report").joinpath("assets", name).read_text("utf-8")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def escaped(value: object) -> str:
    """A text of a run or a model as HTML."""
    return html.escape(visible(str(value)))


def _data(name: str, value: Any) -> str:
    text = clean_text(json.dumps(value, ensure_ascii=False, separators=(",", ":")))
    packed = base64.b64encode(gzip.compress(text.encode(), 6, mtime=0)).decode()
    return f'<script type="text/plain" id="{name}">{packed}</script>'


# ---- Audits ----


def _audits(runs: Sequence[Run], limit: int) -> tuple[dict[str, Any], list[str], str]:
    """The index of all embedded trajectories, their blocks, and a note: what was left out, and controls."""
    prompts: dict[str, int] = {}
    rows: list[list[Any]] = []
    blocks: list[str] = []
    chosen = _within(runs, limit)
    branched = [False] * len(runs)
    for number, (run, places) in enumerate(zip(runs, chosen, strict=True)):
        block: list[dict[str, Any]] = []
        for place, trajectory in zip(places, read_audits(run.folder, places), strict=True):
            prompt = prompts.setdefault(text_of_prompt(trajectory.prompt), len(prompts))
            bits = sum(bool(has(trajectory)) << bit for bit, (_, has) in enumerate(OUTCOMES))
            values = [round(1000 * preference_of(chunk)) for chunk in trajectory.chunks]
            branched[number] |= any(chunk.branches for chunk in trajectory.chunks)
            rows.append([number, place.step, place.rank, place.index, prompt, values, bits, len(blocks), len(block)])
            block.append(_details(run, trajectory))
            if len(block) == BLOCK:
                blocks.append(_data(f"block-{len(blocks)}", block))
                block = []
        if block:
            blocks.append(_data(f"block-{len(blocks)}", block))
    index = {
        "runs": [run.name for run in runs],
        "branched": branched,
        "processes": max((row[2] for row in rows), default=0) + 1,
        "outcomes": [name for name, _ in OUTCOMES],
        "prompts": list(prompts),
        "rows": rows,
    }
    left_out = ""
    total = sum(len(run.places) for run in runs)
    if len(rows) < total:
        left_out = (
            f"This file holds {len(rows):,} of {total:,} audited trajectories: those of evenly spaced prompts. Raise "
            "--max_mib for more."
        )
    elif not total:
        left_out = "Nothing has been audited yet."
    controls = (f"{run.name}: {run.control}" for run in runs if run.control)
    return index, blocks, " ".join(filter(None, [left_out, *controls]))


def _within(runs: Sequence[Run], limit: int) -> list[list[AuditPlace]]:
    """The audits of each run that are embedded, about `limit` bytes in all.

    They are those of evenly spaced prompts, and the same ones in all runs: a prompt can then be compared at several
    steps and between runs.
    """
    # Records are compressed as well. The ids in them, which the page leaves out, are at least what base64 adds.
    weight = {id(place): place.size for run in runs for place in run.places}
    if sum(weight.values()) <= limit:
        return [run.places for run in runs]
    groups: dict[str, list[tuple[int, AuditPlace]]] = {}
    for number, run in enumerate(runs):
        for place, prompt in zip(run.places, read_prompts(run.folder, run.places), strict=True):
            groups.setdefault(json.dumps(prompt), []).append((number, place))
    spaced = _spaced(list(groups.values()), [sum(weight[id(p)] for _, p in group) for group in groups.values()], limit)
    places = [pair for group in spaced for pair in group]
    # One prompt may already be more than the limit.
    places = _spaced(places, [weight[id(place)] for _, place in places], limit)
    return [sorted(place for at, place in places if at == number) for number in range(len(runs))]


def _spaced(items: list[T], sizes: list[int], limit: int) -> list[T]:
    """Evenly spaced items, at least one, whose sizes add up to about the limit; all of them when they fit."""
    every = max(1.0, sum(sizes) / limit)
    return [items[int(k * every)] for k in range(max(1, int(len(items) / every)))]


def _details(run: Run, trajectory: AuditedTrajectory) -> dict[str, Any]:
    pieces = run.pieces(trajectory)
    # Characters before each token.
    offsets = list(accumulate(map(len, pieces), initial=0))
    chunks = []
    for chunk in trajectory.chunks:
        start, end = len(chunk.prefix), len(chunk.prefix) + len(chunk.text)
        fork = start
        if pieces:
            start, end, fork = (offsets[position] for position in (chunk.start, chunk.end, chunk.anchor))
        chunks.append(
            {
                "start": start,
                "end": end,
                "fork": fork,
                "text": chunk.text,
                "prior": chunk.prior,
                "posterior": chunk.posterior,
                "weight": chunk.weight,
                "rollouts": chunk.distinct_rollouts(),
                "k": sum(chunk.similarities),
                "n": len(chunk.rollouts),
                "mark": chunk.mark,
                "branches": [(b.text, count, b.similarity, b.advantage) for b, count in chunk.distinct_branches()],
                "imitated": [chunk.imitated_of(text) for text, *_ in chunk.distinct_rollouts() if chunk.imitated],
            }
        )
    last = trajectory.chunks[-1] if trajectory.chunks else None
    return {
        "text": "".join(pieces) or (last.prefix + last.text if last else ""),
        "shades": _shades(map(len, pieces), trajectory.entropies) if trajectory.entropies else [],
        "chunks": chunks,
        "facts": facts_of(trajectory),
        "notes": [
            *(f"the judge wrote: {' | '.join(answer.splitlines())}" for answer in trajectory.answers),
            *(f"missing: {failure}" for failure in trajectory.failures),
        ],
        "context": trajectory.teacher_context,
    }


def _shades(lengths: Iterable[int], entropies: Iterable[float]) -> list[list[int]]:
    """Runs of characters with one shade, as [length, shade]."""
    shaded = zip((bisect(SHADES, entropy) - 1 for entropy in entropies), lengths, strict=False)
    return [[sum(length for _, length in run), shade] for shade, run in groupby(shaded, key=itemgetter(0))]


# ---- Sections ----


def _summary(run: Run) -> str:
    cards = "".join(
        f"<div><dt>{escaped(name)}</dt><dd>{escaped(value)}</dd></div>" for name, value in run.summary().items()
    )
    settings = html_table((), [[name, "" if value is None else value] for name, value in run.settings.items()])
    teacher = run.settings.get("teacher")
    return (
        f"<h3>{escaped(run.name)}</h3>\n"
        + (f'<p class="muted">Teacher: {escaped(short_name(teacher))}</p>\n' if teacher else "")
        + (f"<p>{escaped(run.control)}</p>\n" if run.control else "")
        + f'<dl class="cards">{cards}</dl>\n'
        f"<details><summary>All settings of {escaped(run.name)}</summary>"
        f"{settings}</details>"
    )


def _probe(run: Run) -> str:
    """The verdict, the recommended options and the numbers of `omniopd probe`; empty for a run."""
    result = run.probe
    if result is None:
        return ""
    advice = [[name, json.dumps(value), result["reasons"][name]] for name, value in result["options"].items()]
    signals = () if result["measured"] is None else result["measured"]["signals"]
    parts = [
        f"<h3>{escaped(run.name)}</h3>\n<p><strong>{escaped(result['verdict'])}</strong>: "
        f"{escaped(result['reason'])}.</p>",
        html_table(("option", "recommended", "reason"), advice) if advice else "",
        "<h4>Measured</h4>" + html_table((), [*measured_rows(result), *cost_rows(result)]),
        f"<h4>Similarities and chunk lengths, the recipe's first</h4>{html_table(*signal_rows(signals))}"
        if signals
        else "",
    ]
    return "\n".join(part for part in parts if part)


def _figures(runs: Sequence[Run]) -> str:
    shown = []
    for figure in Figure.all(runs):
        light, dark = (f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}" for svg in figure.svgs())
        shown.append(
            f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
            f'<img src="{light}" alt="{escaped(figure.description)}"></picture></figure>'
        )
    return f'<div class="figures">{"".join(shown)}</div>' if shown else "<p>Nothing has been logged yet.</p>"
