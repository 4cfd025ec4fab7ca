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
from collections.abc import Iterable, Sequence
from importlib.resources import files
from string import Template
from typing import Any

from omniopd_trl.journal.browse import AuditedTrajectory, read_audits
from omniopd_trl.report.figures import Figure
from omniopd_trl.report.runs import Run, text_of_prompt

# Trajectories per compressed block. A click decompresses one block.
BLOCK = 50
# Entropy, in nats, from which a token has the shade of this index.
SHADES = (0.0, 0.05, 0.25, 0.75, 1.5, 2.5)
# Filters of the browser. A trajectory has one if any of its chunks or samples does.
OUTCOMES = (
    ("a rollout restarted", lambda t: t.outcomes.get("restarted", 0)),
    ("a sample was refused", lambda t: t.outcomes.get("refused", 0) or t.outcomes.get("filtered", 0)),
    ("a chunk was dropped", lambda t: t.num_dropped),
    ("a chunk without any similarity", lambda t: any(not any(chunk.similarities) for chunk in t.chunks)),
    ("a chunk that every rollout repeats", lambda t: any(min(c.similarities, default=0) == 1 for c in t.chunks)),
)
MIB = 2**20


def write_page(runs: Sequence[Run], *, max_mib: float = 24.0, live: bool = False) -> str:
    """The report as HTML.

    Args:
        runs: one run, or two to compare.
        max_mib: limit of the embedded audits, in MiB. If the runs hold more, evenly spaced trajectories are embedded,
            and the page says how many were left out.
        live: whether the page asks the server that sent it for changes.

    Raises:
        JournalError: when a journal is damaged.
    """
    index, blocks, left_out = _audits(runs, round(max_mib * MIB))
    title = "OmniOPD: " + " and ".join(run.name for run in runs)
    page, style, script = (_asset(f"page.{kind}") for kind in ("html", "css", "js"))
    values = {
        "title": html.escape(title),
        "style": style,
        "style_hash": _hash(style),
        "script": script,
        "script_hash": _hash(script),
        "connect": "connect-src 'self';" if live else "",
        "summary": "\n".join(_summary(run) for run in runs),
        "figures": _figures(runs),
        "left_out": html.escape(left_out),
        "data": "\n".join([_data("index", {**index, "live": live}), *blocks]),
    }
    return Template(page).substitute(values)


def _asset(name: str) -> str:
    return files("omniopd_trl.report").joinpath("assets", name).read_text("utf-8")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _data(name: str, value: Any) -> str:
    packed = gzip.compress(
        json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace"), 6, mtime=0
    )
    return f'<script type="text/plain" id="{name}">{base64.b64encode(packed).decode()}</script>'


# ---- Audits ----


def _audits(runs: Sequence[Run], limit: int) -> tuple[dict[str, Any], list[str], str]:
    """The index of all embedded trajectories, their blocks, and a sentence on what was left out."""
    prompts: dict[str, int] = {}
    rows: list[list[Any]] = []
    blocks: list[str] = []
    total = kept = 0
    for number, run in enumerate(runs):
        places = run.places
        total += len(places)
        # A recorded audit is compressed as well; in base64 it takes four thirds.
        every = max(1.0, sum(place.size for place in places) * 4 / 3 / (limit / len(runs)))
        if every > 1:
            places = [places[int(k * every)] for k in range(int(len(places) / every))]
        block: list[dict[str, Any]] = []
        for trajectory in read_audits(run.folder, places):
            posteriors = [chunk.posterior for chunk in trajectory.chunks]
            low, mean, high = (
                (min(posteriors), sum(posteriors) / len(posteriors), max(posteriors)) if posteriors else (None,) * 3
            )
            prompt = prompts.setdefault(text_of_prompt(trajectory.prompt), len(prompts))
            bits = sum(bool(has(trajectory)) << bit for bit, (_, has) in enumerate(OUTCOMES))
            rounded = [None if value is None else round(value, 4) for value in (low, mean, high)]
            place = [len(blocks), len(block)]
            rows.append([number, trajectory.step, prompt, *rounded, len(posteriors), bits, *place])
            block.append(_details(run, trajectory))
            if len(block) == BLOCK:
                blocks.append(_data(f"block-{len(blocks)}", block))
                block = []
            kept += 1
        if block:
            blocks.append(_data(f"block-{len(blocks)}", block))
    index = {
        "runs": [run.name for run in runs],
        "outcomes": [name for name, _ in OUTCOMES],
        "prompts": list(prompts),
        "rows": rows,
    }
    left_out = ""
    if kept < total:
        left_out = (
            f"This file holds {kept:,} of {total:,} audited trajectories, evenly spaced over the run. Raise --max_mib "
            "for more."
        )
    elif not total:
        left_out = "Nothing has been audited yet."
    return index, blocks, left_out


def _details(run: Run, trajectory: AuditedTrajectory) -> dict[str, Any]:
    pieces = run.pieces(trajectory)
    chunks = []
    for chunk in trajectory.chunks:
        start = len(chunk.prefix)
        chunks.append(
            {
                "start": start,
                "end": start + len(chunk.text),
                "anchor": start + chunk.fork(pieces),
                "text": chunk.text,
                "prior": chunk.prior,
                "posterior": chunk.posterior,
                "weight": chunk.weight,
                "rollouts": chunk.distinct_rollouts(),
                "k": sum(chunk.similarities),
                "n": len(chunk.similarities),
            }
        )
    last = trajectory.chunks[-1] if trajectory.chunks else None
    usage = trajectory.usage
    facts = [f"tokens read {usage.prompt_tokens:,}, written {usage.completion_tokens:,}"]
    if trajectory.usd is not None:
        facts.append(f"{trajectory.usd:.5f} dollars")
    return {
        "text": "".join(pieces) or (last.prefix + last.text if last else ""),
        "shades": _shades(map(len, pieces), trajectory.entropies) if trajectory.entropies else [],
        "chunks": chunks,
        "facts": facts,
        "failures": list(trajectory.failures),
    }


def _shades(lengths: Iterable[int], entropies: Iterable[float]) -> list[list[int]]:
    """Runs of characters with one shade, as [length, shade]."""
    runs: list[list[int]] = []
    for length, entropy in zip(lengths, entropies, strict=False):
        shade = sum(entropy >= bound for bound in SHADES[1:])
        if runs and runs[-1][1] == shade:
            runs[-1][0] += length
        else:
            runs.append([length, shade])
    return runs


# ---- Summary and figures ----


def _summary(run: Run) -> str:
    def table(rows: Iterable[tuple[str, Any]]) -> str:
        cells = (
            f'<tr><th scope="row">{html.escape(name)}</th><td>{html.escape(str(value))}</td></tr>'
            for name, value in rows
        )
        return f"<table><tbody>{''.join(cells)}</tbody></table>"

    settings = table(run.settings.items())
    return (
        f"<h3>{html.escape(run.name)}</h3>\n{table(run.summary().items())}\n"
        f"<details><summary>All settings of {html.escape(run.name)}</summary>{settings}</details>"
    )


def _figures(runs: Sequence[Run]) -> str:
    shown = []
    for figure in Figure.all(runs):
        light, dark = (
            f"data:image/svg+xml;base64,{base64.b64encode(figure.svg(dark=dark)).decode()}" for dark in (False, True)
        )
        shown.append(
            f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
            f'<img src="{light}" alt="{html.escape(figure.description)}"></picture></figure>'
        )
    return f'<div class="figures">{"".join(shown)}</div>' if shown else "<p>Nothing has been logged yet.</p>"
