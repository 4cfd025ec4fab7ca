# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Figures of the logged metrics, for the report and for papers."""

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from omniopd_trl.errors import import_extra
from omniopd_trl.report.runs import Run

# File name, title, label of the y axis, and metrics with their names in the legend. A metric with `*` has a line for
# each logged name that matches, such as one for each evaluation set. The first three are those of the paper's Fig. 3.
FIGURES: tuple[tuple[str, str, str, dict[str, str]], ...] = (
    ("chunk_loss", "Chunk loss", "nats per audited token", {"chunk_loss": "chunk loss"}),
    (
        "kl",
        "KL to the reference",
        "nats per token",
        {"kl/unaudited": "un-audited tokens", "kl/audited": "audited tokens"},
    ),
    ("pass_at_1", "pass@1", "share of correct answers", {"eval_*pass@1*": ""}),
    (
        "posterior",
        "Posterior, prior and similarity",
        "mean over chunks",
        {"audit/posterior": "posterior", "audit/similarity": "similarity", "audit/prior": "prior"},
    ),
    ("spread", "Spread of the posteriors", "standard deviation", {"audit/posterior_std": "posterior"}),
    ("marks", "Marks of the judge", "mean over chunks", {"judge/mark": "mark"}),
    (
        "judge",
        "Marks with rollouts, answers without marks",
        "share",
        {"judge/frac_rollouts": "marked chunks with rollouts", "judge/malformed": "answers without marks"},
    ),
    ("advantages", "Spread of the advantages", "standard deviation", {"branches/advantage_std": "advantages"}),
    (
        "branches",
        "Branches of the student",
        "mean over forks",
        {
            "branches/agreed": "share of forks with one text",
            "branches/diversity": "diversity of the others",
            "branches/similarity": "their similarity",
        },
    ),
    ("imitation", "Imitation of the rollouts", "nats per imitated token", {"imitation/loss": "cross-entropy"}),
    ("left_out", "Rollouts left out of the imitation", "share", {"imitation/left_out": "left out"}),
    ("context", "Rollouts that quote the teacher's context", "share", {"rollouts/context_quoted": "quote it"}),
    ("chunks", "Chunks", "mean per trajectory", {"audit/num_chunks": "chunks"}),
    (
        "stopped",
        "Agreement of the teacher with itself",
        "share",
        {"audit/rollout_agreement": "equal pairs of rollouts", "audit/frac_stopped": "chunks without further ones"},
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
        "lost",
        "Samples without a rollout",
        "share of the samples",
        {
            "share/restarted": "restarted",
            "share/refused": "refused",
            "share/filtered": "filtered",
            "share/empty": "empty",
        },
    ),
    (
        "requests",
        "Repeated and failed requests",
        "requests per step",
        {"teacher/retries": "repeated", "teacher/failed_requests": "failed"},
    ),
    ("reward", "Rewards of the trajectories", "mean", {"reward": "reward", "rewards/*/mean": ""}),
    (
        "groups",
        "Groups and audits of the verifier",
        "share",
        {"frac_reward_zero_std": "groups with equal rewards", "audit/chosen_trajectories": "audited trajectories"},
    ),
    (
        "tokens",
        "Teacher tokens per step",
        "tokens",
        {
            "teacher/prompt_tokens": "read",
            "teacher/cached_tokens": "of these cached",
            "teacher/completion_tokens": "written",
        },
    ),
    (
        "tokens_total",
        "Teacher tokens so far",
        "tokens",
        {"total/prompt_tokens": "read", "total/completion_tokens": "written"},
    ),
    ("dollars", "Cost so far", "US dollars", {"total/usd": "dollars"}),
    ("latency", "Latency of the teacher", "seconds per request", {"teacher/latency": "latency"}),
    ("waiting", "Waiting for the teacher", "seconds per step", {"teacher/wait_seconds": "waiting"}),
    ("length", "Length of the completions", "tokens", {"completions/mean_length": "mean"}),
    ("clipped", "Completions cut at the maximum length", "share", {"completions/clipped_ratio": "cut"}),
    ("copied", "Words that repeat the prompt", "share of the words", {"eval_*completions/copied_share": ""}),
    ("off_policy", "KL from the student of the export", "nats per token", {"off_policy/kl": "KL"}),
    ("truncated", "Truncated importance weights", "share of the tokens", {"off_policy/truncated": "truncated"}),
    ("importance", "Importance weights", "mean", {"sampling/importance_sampling_ratio/mean": "weight"}),
    (
        "sampling",
        "vLLM's log-probabilities and the student's",
        "mean difference, nats",
        {"sampling/sampling_logp_difference/mean": "difference"},
    ),
    ("loss", "Loss of the training", "mean", {"loss": "loss"}),
    ("grad_norm", "Norm of the gradient", "before clipping", {"grad_norm": "norm"}),
)
# These count what a run need not have: they are left out where all values are 0.
COUNTS = {
    *("judge", "left_out", "stopped", "shares", "lost", "requests", "tokens", "tokens_total", "dollars", "waiting"),
    *("clipped", "copied", "truncated"),
}
COLORS = ("#2563c9", "#c2570c", "#0f8a63", "#9b3f8f", "#8a6d00", "#5b6470", "#1f8a9e", "#7a4a1e")
TEXT, LINES, GROUND = "#1c2128", "#d9dee5", "#ffffff"
# The color of each of these in a dark page.
DARK = dict(
    zip(
        (*COLORS, TEXT, LINES, GROUND),
        (
            *("#6db6f2", "#ff9e5e", "#4fd1a5", "#e39acb", "#e0c04f", "#a5aebb", "#67d3e0", "#d6a77a"),
            *("#e8ebf0", "#39414c", "#1b2027"),
        ),
        strict=True,
    )
)
# Of the runs. A line of few points has a marker as well.
STYLES, MARKERS = ("-", "--", ":", "-."), ("o", "s", "^", "D")
# A legend of more names than this, or of longer ones, is below the figure. Names are cut to the width of the figure.
_LEGEND, _COLUMN, _WIDTH = 4, 36, 64


@dataclass(frozen=True)
class Figure:
    """One figure of one or several runs.

    Attributes:
        name: name of its file.
        title: title.
        unit: label of the y axis.
        lines: for each line its name, the number of its run, its steps and its values.
        has_legend: whether the title does not name the only line.
    """

    name: str
    title: str
    unit: str
    lines: tuple[tuple[str, int, tuple[float, ...], tuple[float, ...]], ...]
    has_legend: bool = False

    @staticmethod
    def all(runs: Sequence[Run]) -> "list[Figure]":
        """The figures for which at least one run has logged a metric."""
        figures = []
        for name, title, unit, metrics in FIGURES:
            lines = []
            for number, run in enumerate(runs):
                for metric, label in _found(run, metrics):
                    if points := run.series(metric):
                        steps, values = zip(*points, strict=True)
                        lines.append((f"{label}, {run.name}" if len(runs) > 1 else label, number, steps, values))
            if lines and (name not in COUNTS or any(any(values) for _, _, _, values in lines)):
                figures.append(Figure(name, title, unit, tuple(lines), max(len(metrics), len(lines)) > 1))
        return figures

    @property
    def description(self) -> str:
        """The figure in words: the first and the last value of each line."""
        ends = (f"{name} from {values[0]:.4g} to {values[-1]:.4g}" for name, _, _, values in self.lines)
        return f"{self.title} over {int(max(steps[-1] for _, _, steps, _ in self.lines))} steps: {'; '.join(ends)}."

    @property
    def _largest(self) -> float:
        return max(abs(value) for _, _, _, values in self.lines for value in values)

    def svgs(self) -> tuple[bytes, bytes]:
        """The figure as SVG, with text as text, for a light page and for a dark one."""
        light = dark = self._render("svg")
        for color, in_the_dark in DARK.items():
            dark = dark.replace(color.encode(), in_the_dark.encode())
        return light, dark

    def png(self) -> bytes:
        """The figure as PNG."""
        return self._render("png")

    def write(self, folder: Path) -> list[Path]:
        """Write the figure as SVG and PNG, and return the paths."""
        paths = [folder / f"{self.name}.{kind}" for kind in ("svg", "png")]
        for path in paths:
            path.write_bytes(self._render(path.suffix[1:]))
        return paths

    def _render(self, kind: str) -> bytes:
        matplotlib = import_extra("matplotlib", "report")
        from matplotlib.figure import Figure as Canvas
        from matplotlib.ticker import EngFormatter, MaxNLocator, ScalarFormatter

        style = {
            **dict.fromkeys(
                ("text.color", "axes.titlecolor", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), TEXT
            ),
            **dict.fromkeys(("axes.edgecolor", "grid.color", "xtick.color", "ytick.color"), LINES),
            **dict.fromkeys(("figure.facecolor", "axes.facecolor"), GROUND),
            **{"axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True},
            **{"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9, "svg.hashsalt": self.name},
            "text.parse_math": False,  # a name of a run may hold dollar signs
        }
        with matplotlib.rc_context(style):
            names = [name if len(name) <= _WIDTH else f"{name[:24]}…{name[25 - _WIDTH :]}" for name, *_ in self.lines]
            columns = 2 if max(map(len, names)) <= _COLUMN else 1
            below = self.has_legend and (len(names) > _LEGEND or columns == 1)
            rows = -(-len(names) // columns) if below else 0
            canvas = Canvas(figsize=(4.4, 2.9 + 0.16 * rows), layout="constrained")
            axes = canvas.subplots()
            by_label: dict[str, int] = {}
            for name, (label, number, steps, values) in zip(names, self.lines, strict=True):
                color = by_label.setdefault(label.partition(",")[0], len(by_label))
                marker = MARKERS[number % len(MARKERS)] if len(steps) < 12 else None
                axes.plot(
                    steps,
                    values,
                    STYLES[number % len(STYLES)],
                    color=COLORS[color % len(COLORS)],
                    label=name,
                    linewidth=1.6,
                    marker=marker,
                    markersize=3,
                )
            axes.set_title(self.title, fontsize=10, fontweight="bold", loc="left")
            axes.set_xlabel("optimizer step")
            axes.set_ylabel(self.unit)
            is_large = self._largest >= 10_000
            axes.yaxis.set_major_formatter(EngFormatter(sep="") if is_large else ScalarFormatter(useOffset=False))
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
            if len(every := {step for _, _, steps, _ in self.lines for step in steps}) == 1:
                axes.set_xlim(min(every) - 1, max(every) + 1)
            axes.tick_params(length=0)
            axes.spines[["top", "right", "left"]].set_visible(False)
            if below:
                canvas.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=7)
            elif self.has_legend:
                axes.legend(frameon=False, fontsize=8)
            file = io.BytesIO()
            canvas.savefig(file, format=kind, dpi=200, metadata={"Date": None} if kind == "svg" else None)
        return file.getvalue()


def _found(run: Run, metrics: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """The metrics of a figure, each with its name in the legend."""
    for metric, label in metrics.items():
        names = run.names(metric)
        if label:
            yield metric, label
        elif len(names) > 1 or len(metrics) == 1:  # a single reward function is the reward
            for name in names:
                yield name, name.removeprefix("eval_").removeprefix("rewards/").removesuffix("/mean")


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

    paths = [path.with_name(path.name + suffix) for suffix in (".svg", ".png")]
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
