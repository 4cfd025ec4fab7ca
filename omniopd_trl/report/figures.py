# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Figures of the logged metrics, for the report and for papers."""

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omniopd_trl.errors import import_extra
from omniopd_trl.report.runs import Run

# File name, title, label of the y axis, and metrics with their names in the legend. The first three are those of the
# paper's Fig. 3.
FIGURES: tuple[tuple[str, str, str, dict[str, str]], ...] = (
    ("chunk_loss", "Chunk loss", "nats per audited token", {"chunk_loss": "chunk loss"}),
    (
        "kl",
        "KL to the reference",
        "nats per token",
        {"kl/unaudited": "un-audited tokens", "kl/audited": "audited tokens"},
    ),
    ("pass_at_1", "pass@1", "", {"eval_pass@1": "student"}),
    (
        "posterior",
        "Posterior",
        "",
        {
            "audit/posterior": "posterior",
            "audit/posterior_std": "its standard deviation",
            "audit/similarity": "similarity",
            "audit/prior": "prior",
        },
    ),
    (
        "entropy",
        "Entropy of the student",
        "nats",
        {"entropy": "all tokens", "audit/anchor_entropy": "at the anchors"},
    ),
    (
        "shares",
        "Chunks and rollouts without a signal",
        "share",
        {
            "audit/dropped_chunks": "dropped chunks",
            "audit/frac_similarity_zero": "chunks with similarity 0",
            "audit/frac_similarity_one": "chunks with similarity 1",
            "audit/duplicate_rollouts": "duplicate rollouts",
            "audit/short_rollouts": "short rollouts",
        },
    ),
    (
        "outcomes",
        "Samples that were lost",
        "samples per step",
        {
            "teacher/restarted": "restarted",
            "teacher/refused": "refused",
            "teacher/filtered": "filtered",
            "teacher/empty": "empty",
            "teacher/failed_requests": "failed requests",
        },
    ),
    (
        "tokens",
        "Tokens of the teacher",
        "tokens per step",
        {
            "teacher/prompt_tokens": "read",
            "teacher/cached_tokens": "of these cached",
            "teacher/completion_tokens": "written",
        },
    ),
    ("dollars", "Cost so far", "US dollars", {"teacher/usd_total": "dollars"}),
    ("waiting", "Waiting for the teacher", "seconds per step", {"teacher/wait_seconds": "waiting"}),
    ("length", "Length of completions", "tokens", {"completions/mean_length": "mean"}),
)
COLORS = ("#0072b2", "#d55e00", "#009e73", "#a6468b", "#8a6d00")
DARK_COLORS = ("#6db6f2", "#ff9e5e", "#4fd1a5", "#e39acb", "#e0c04f")
STYLES = ("-", "--")


@dataclass(frozen=True)
class Figure:
    """One figure of one or several runs.

    Attributes:
        name: name of its file.
        title: title.
        unit: label of the y axis.
        lines: for each line its name, the number of its run, its steps and its values.
    """

    name: str
    title: str
    unit: str
    lines: tuple[tuple[str, int, tuple[float, ...], tuple[float, ...]], ...]

    @staticmethod
    def all(runs: Sequence[Run]) -> "list[Figure]":
        """The figures for which at least one run has logged a metric."""
        figures = []
        for name, title, unit, metrics in FIGURES:
            lines = []
            for number, run in enumerate(runs):
                for metric, label in metrics.items():
                    if points := run.series(metric):
                        steps, values = zip(*points, strict=True)
                        lines.append((f"{label}, {run.name}" if len(runs) > 1 else label, number, steps, values))
            if any(any(values) for _, _, _, values in lines):
                figures.append(Figure(name, title, unit, tuple(lines)))
        return figures

    @property
    def description(self) -> str:
        """The figure in words: the first and the last value of each line."""
        ends = (f"{name} from {values[0]:.3g} to {values[-1]:.3g}" for name, _, _, values in self.lines)
        return f"{self.title} over {int(max(steps[-1] for _, _, steps, _ in self.lines))} steps: {'; '.join(ends)}."

    def svg(self, *, dark: bool = False) -> bytes:
        """The figure as SVG, with text as text."""
        return self._render("svg", dark)

    def png(self) -> bytes:
        """The figure as PNG."""
        return self._render("png", dark=False)

    def write(self, folder: Path) -> list[Path]:
        """Write the figure as SVG and PNG, and return the paths."""
        paths = [folder / f"{self.name}.{kind}" for kind in ("svg", "png")]
        for path in paths:
            path.write_bytes(self._render(path.suffix[1:], dark=False))
        return paths

    def _render(self, kind: str, dark: bool) -> bytes:
        matplotlib = import_extra("matplotlib", "report")
        from matplotlib.figure import Figure as Canvas

        front, back = ("#e6e9ee", "#14171b") if dark else ("#1b1f24", "#ffffff")
        style = {
            **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), front),
            **dict.fromkeys(("figure.facecolor", "axes.facecolor"), back),
            **{"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9, "svg.hashsalt": self.name},
        }
        with matplotlib.rc_context(style):
            canvas = Canvas(figsize=(4.4, 2.9), layout="constrained")
            axes = canvas.subplots()
            colors: Iterable[Any] = DARK_COLORS if dark else COLORS
            by_label: dict[str, int] = {}
            for name, number, steps, values in self.lines:
                color = by_label.setdefault(name.partition(",")[0], len(by_label))
                marker = "o" if len(steps) < 12 else None
                axes.plot(
                    steps,
                    values,
                    STYLES[number % len(STYLES)],
                    color=tuple(colors)[color % len(COLORS)],
                    label=name,
                    linewidth=1.6,
                    marker=marker,
                    markersize=3,
                )
            axes.set_title(self.title, fontsize=10)
            axes.set_xlabel("optimizer step")
            axes.set_ylabel(self.unit)
            axes.spines[["top", "right"]].set_visible(False)
            if len(self.lines) > 1:
                axes.legend(frameon=False, fontsize=8)
            file = io.BytesIO()
            canvas.savefig(file, format=kind, dpi=200, metadata={"Date": None} if kind == "svg" else None)
        return file.getvalue()


def bars(
    rows: Sequence[tuple[str, float, float, Sequence[float]]], unit: str, path: Path, *, baseline: float | None = None
) -> list[Path]:
    """Write a bar for each setting of an ablation, as SVG and PNG.

    Args:
        rows: name, mean, standard deviation over seeds, and the value of each seed.
        unit: label of the axis.
        path: path of the files, without suffix.
        baseline: value that a dotted line marks, such as that before training.

    Returns:
        The paths.

    Raises:
        MissingExtraError: when matplotlib is not installed.
    """
    matplotlib = import_extra("matplotlib", "report")
    from matplotlib.figure import Figure as Canvas

    paths = [path.with_suffix(suffix) for suffix in (".svg", ".png")]
    with matplotlib.rc_context({"svg.fonttype": "none", "font.size": 9, "svg.hashsalt": path.name}):
        canvas = Canvas(figsize=(5.2, 0.6 + 0.32 * len(rows)), layout="constrained")
        axes = canvas.subplots()
        names, means, errors, values = zip(*rows, strict=True)
        places = range(len(rows))
        axes.barh(places, means, xerr=errors, color=COLORS[0], alpha=0.55, capsize=2)
        for place, seeds in zip(places, values, strict=True):
            axes.plot(seeds, [place] * len(seeds), "o", color=COLORS[0], markersize=3)
        if baseline is not None:
            axes.axvline(baseline, color="#5b6470", linestyle=":", linewidth=1)
        axes.set_yticks(places, names)
        axes.invert_yaxis()
        axes.set_xlabel(unit)
        axes.spines[["top", "right"]].set_visible(False)
        for target in paths:
            canvas.savefig(target, dpi=200, metadata={"Date": None} if target.suffix == ".svg" else None)
    return paths
