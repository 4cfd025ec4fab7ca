# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Which figures a run has, what is in them, and what they are drawn from."""

import json
import re
from pathlib import Path

import pytest

from omniopd_trl.report.figures import COUNTS, FIGURES, Figure
from omniopd_trl.report.runs import Run
from omniopd_trl.trainer.metrics import branch_ratios, context_ratios, judge_ratios
from tests.support import ROOT
from tests.support.journals import journal

METRICS = {metric for *_, metrics in FIGURES for metric in metrics}


def run_of(folder: Path, *sessions: list[dict]) -> Run:
    """A run whose processes logged these metrics, one after the other."""
    for logs in sessions:
        with journal(folder, num_processes=1) as j:
            for entry in logs:
                j.record_log(entry)
    return Run(folder)


def lines(run: Run) -> dict[str, dict[str, list[float]]]:
    """The values of each line of each figure."""
    return {figure.name: {label: list(values) for label, _, _, values in figure.lines} for figure in Figure.all([run])}


def test_metrics_of_options():
    """What an option adds to the log, or the page on metrics says to watch, is in a figure."""
    added = {*judge_ratios([]), *branch_ratios([]), *context_ratios([], [])}
    added |= {"imitation/loss", "imitation/left_out", "reward", "off_policy/kl", "off_policy/truncated"}
    page = (ROOT / "docs" / "metrics.md").read_text("utf-8")
    watched = page.partition("## What to watch")[2]
    added |= set(re.findall(r"^\| `(\w+(?:/\w+)?)` \|", watched, re.MULTILINE))
    assert "completions/clipped_ratio" in added
    assert added - METRICS == set()


@pytest.mark.parametrize(
    ("logged", "shown"),
    [
        ({"judge/mark": 0.25, "judge/malformed": 0}, {"marks": {"mark": [0.25]}}),
        ({"imitation/loss": 2.5, "imitation/left_out": 0}, {"imitation": {"cross-entropy": [2.5]}}),
        ({"reward": 2.0, "rewards/math/mean": 1.0}, {"reward": {"reward": [2.0]}}),
        (
            {"reward": 2.0, "rewards/a/b/mean": 1.0, "rewards/c/mean": 0.0},
            {"reward": {"reward": [2.0], "a/b": [1.0], "c": [0.0]}},
        ),
        ({"eval_pass@1/a": 0.0, "eval_pass@1/b": 0.5}, {"pass_at_1": {"pass@1/a": [0.0], "pass@1/b": [0.5]}}),
        ({"eval_easy_pass@1": 0.5, "eval_loss": 1.0}, {"pass_at_1": {"easy_pass@1": [0.5]}}),
        # That nothing was lost or paid needs no figure. That the branches do not differ is a result.
        ({"teacher/retries": 0, "branches/advantage_std": 0.0}, {"advantages": {"advantages": [0.0]}}),
    ],
)
def test_lines(tmp_path, logged, shown):
    assert lines(run_of(tmp_path, [{"step": 1, **logged}])) == shown


def test_names():
    """Each figure is a file of its own."""
    names = [name for name, *_ in FIGURES]
    assert len({*names}) == len(names)
    assert COUNTS < {*names}


def test_a_run_that_starts_over(tmp_path):
    """Its steps replace those of the earlier run, later ones included. An evaluation replaces nothing but itself."""
    first = [{"step": 0, "eval_pass@1": 0.25}, *({"step": step, "loss": float(step)} for step in range(1, 6))]
    again = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]
    resumed = [{"step": 2, "eval_pass@1": 0.5}, {"step": 3, "loss": 0.125}, {"step": 0, "eval_pass@1": 0.75}]
    assert run_of(tmp_path / "a", first, again).series("loss") == [(1, 0.5), (2, 0.25)]
    run = run_of(tmp_path / "b", first, again, resumed)
    assert run.series("loss") == [(1, 0.5), (2, 0.25), (3, 0.125)]
    assert run.series("eval_pass@1") == [(0, 0.75), (2, 0.5)]


def test_numbers_that_are_none(tmp_path):
    """NaN, infinity and a missing value are no points."""
    logs = [{"step": step, "loss": loss} for step, loss in enumerate((1.0, None, float("nan"), float("inf"), 2.0))]
    run = run_of(tmp_path, [])
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": logs}))
    assert run.series("loss") == [(0, 1.0), (4, 2.0)]


def drawn(figure: Figure) -> str:
    return figure.svgs()[0].decode()


def test_drawing(tmp_path):
    """A line that the title does not name has a legend. Steps are whole numbers. Four runs have four styles."""
    pytest.importorskip("matplotlib")
    run = run_of(tmp_path, [{"step": 7, "audit/similarity": 0.5, "audit/posterior_std": 0.5}])
    similarity, spread = map(drawn, Figure.all([run]))
    assert ">similarity</text>" in similarity
    assert ">posterior</text>" not in spread
    ticks = re.findall(r">(\d[\d.]*)</text>", spread.partition("matplotlib.axis_2")[0])
    assert ticks == ["6", "7", "8"]
    (four, _) = Figure.all([run] * 4)
    styles = {*re.findall(r"stroke-dasharray: ([^;\"]+)", drawn(four))}
    assert len(styles) == 3  # and a solid line
    run.name = 99 * "x"  # the legend is then below, and does not cover the lines
    named, _ = map(drawn, Figure.all([run, run]))
    heights = [float(re.search(r'height="([\d.]+)pt"', svg)[1]) for svg in (similarity, named)]
    assert heights[0] < heights[1]
    assert max(map(len, re.findall(r">(similarity[^<]*)<", named))) == 64
