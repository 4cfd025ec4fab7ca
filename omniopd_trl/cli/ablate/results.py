# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""What the runs of `omniopd ablate` have measured, and the table of a plan."""

import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omniopd_trl.cli.ablate.plan import FINISHED, Plan
from omniopd_trl.errors import DataError

# Fields of a result that a row has the mean of.
_AVERAGED = (
    *("before", "after", "kl", "length", "copied", "similarity_first", "similarity_last"),
    *("read", "written", "usd", "seconds", "processor_seconds"),
)


@dataclass(frozen=True)
class Result:
    """What a finished run measured.

    Attributes:
        before: pass@1 of the initial student; `None` when it was not evaluated.
        after: pass@1 after the last step.
        problems: mean score of each problem after the last step, by prompt.
        kl: KL to the initial student on un-audited tokens of the evaluation, in nats per token.
        length: tokens per completion of the evaluation.
        copied: share of the completions that repeats the prompt; see `copied_share`.
        similarity_first: mean similarity to the rollouts in the first quarter of the logged steps; of all branches if
            there are some, or else of the chunks. `None` without a teacher's rollouts.
        similarity_last: the same in the last quarter. Where it rises and `after` falls, the student learns to agree
            instead of to solve.
        read: tokens that the teacher read.
        written: tokens that the teacher wrote.
        usd: cost of the teacher in US dollars.
        seconds: wall time of the run.
        processor_seconds: time of a processor that the run took, with its evaluations. Other jobs on the machine
            hardly change it. `None` for runs of earlier versions.
    """

    before: float | None
    after: float
    problems: Mapping[str, float] = field(repr=False)
    kl: float | None
    length: float | None
    copied: float | None
    similarity_first: float | None
    similarity_last: float | None
    read: int
    written: int
    usd: float
    seconds: float
    processor_seconds: float | None = None


def read_result(folder: Path) -> Result:
    """What a finished run measured.

    Raises:
        DataError: when the run did not evaluate.
    """
    import pyarrow.parquet

    from omniopd_trl.journal.reader import spent
    from omniopd_trl.report.runs import Run

    run = Run(folder)
    scores = run.series("eval_pass@1")
    # Not `eval_audits_*`, the table of `audit_eval`.
    tables = sorted((folder / "completions").glob("eval_[0-9]*.parquet"), key=lambda path: int(path.stem[5:]))
    if not scores or not tables:
        raise DataError(
            f"{folder} was not evaluated: its evaluation set needs a column `answer` or `solution`. Name another set "
            "in the plan, and another folder with --output_dir."
        )
    rows = pyarrow.parquet.read_table(tables[-1]).to_pylist()
    problems: dict[str, list[float]] = {}
    for row in rows:
        score = row["pass@1"]
        if score == score:  # NaN where the right answer cannot be read; the mean leaves it out as well
            problems.setdefault(row["prompt"], []).append(score)
    usage, usd = spent(folder)

    def last(metric: str) -> float | None:
        return next((value for _, value in reversed(run.series(metric))), None)

    agreement = [value for _, value in run.series("branches/similarity") or run.series("audit/similarity")]
    quarter = -(-len(agreement) // 4)

    return Result(
        before=scores[0][1] if scores[0][0] == 0 else None,
        after=scores[-1][1],
        problems={prompt: statistics.fmean(values) for prompt, values in problems.items()},
        kl=last("eval_kl/unaudited"),
        length=last("eval_completions/mean_length"),
        copied=last("eval_completions/copied_share"),
        similarity_first=statistics.fmean(agreement[:quarter]) if agreement else None,
        similarity_last=statistics.fmean(agreement[-quarter:]) if agreement else None,
        read=usage.prompt_tokens,
        written=usage.completion_tokens,
        usd=usd,
        **json.loads((folder / FINISHED).read_text(encoding="utf-8")),
    )


def summarize(plan: Plan, results: Mapping[int, Mapping[int, Result]]) -> dict[str, Any]:
    """The table: for each row, means and standard deviations over its seeds, and the test against the first row.

    Args:
        plan: the plan.
        results: results of the finished runs, by row and seed.

    Returns:
        The rows with their numbers, as plain data. `difference` is the mean score minus that of the first row, with
        interval and p-value of a paired test over problems; scores of a problem are averaged over the seeds that both
        rows have. It does not contain the spread of the seeds, which is `after_std`. Where there is none,
        `no_difference` says why.
    """
    from omniopd_trl.evals.evaluate import package_versions

    rows = []
    for number in sorted(results):
        runs = results[number]
        row: dict[str, Any] = {"name": plan.rows[number].name, "options": dict(plan.rows[number].options)}
        row["seeds"] = sorted(runs)
        for name in _AVERAGED:
            values = [value for run in runs.values() if (value := getattr(run, name)) is not None]
            row[name] = statistics.fmean(values) if values else None
        after = [runs[seed].after for seed in sorted(runs)]
        row["after_by_seed"] = after
        row["after_std"] = statistics.stdev(after) if len(after) > 1 else None
        found = None if number == 0 or 0 not in results else _difference(runs, results[0])
        row["difference"], row["no_difference"] = (None, found) if isinstance(found, str) else (found, None)
        rows.append(row)
    return {"versions": package_versions(), "recipe": dict(plan.recipe), "rows": rows}


def _difference(runs: Mapping[int, Result], first: Mapping[int, Result]) -> dict[str, Any] | str:
    """The paired test, or why there is none."""
    from omniopd_trl.evals.statistics import paired_test

    seeds = sorted(runs.keys() & first.keys())
    if not seeds:
        return "no seed has finished in both this row and the first"
    prompts = sorted(set.intersection(*(set(side[seed].problems) for side in (runs, first) for seed in seeds)))
    if not prompts:
        return "its evaluation has other prompts than the first row, so no problems can be paired; compare `after`"
    sides = [
        [statistics.fmean(side[seed].problems[prompt] for seed in seeds) for prompt in prompts]
        for side in (runs, first)
    ]
    test = paired_test(*sides)
    return {"value": test.difference, "interval": [*test.interval], "p_value": test.p_value, "seeds": seeds}


def markdown(table: Mapping[str, Any]) -> str:
    """The table as Markdown."""
    titles = (
        *("setting", "seeds", "pass@1 before", "after", "difference to the first row", "p"),
        *("KL", "tokens", "copied", "similarity", "teacher read", "wrote", "dollars", "seconds", "of a processor"),
    )
    lines = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    for row in table["rows"]:
        test = row["difference"]
        cells = (
            row["name"].replace("|", "\\|"),
            len(row["seeds"]),
            _number(row["before"], ".3f"),
            f"{row['after']:.3f}" + (f" ± {row['after_std']:.3f}" if row["after_std"] is not None else ""),
            "" if test is None else "{:+.3f} [{:+.3f}, {:+.3f}]".format(test["value"], *test["interval"]),
            "" if test is None else f"{test['p_value']:.3f}",
            _number(row["kl"], ".3f"),
            _number(row["length"], ".0f"),
            _number(row["copied"], ".2f"),
            change_of_similarity(row),
            f"{row['read']:,.0f}",
            f"{row['written']:,.0f}",
            f"{row['usd']:.2f}",
            f"{row['seconds']:.0f}",
            _number(row["processor_seconds"], ".0f"),
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    for reason in dict.fromkeys(row["no_difference"] for row in table["rows"] if row["no_difference"]):
        names = ", ".join(row["name"] for row in table["rows"] if row["no_difference"] == reason)
        lines += ["", f"No difference of {names}: {reason}."]
    return "\n".join(lines)


def change_of_similarity(row: Mapping[str, Any]) -> str:
    """The mean similarity in the first and in the last quarter of a row's steps; empty without rollouts."""
    first, last = row.get("similarity_first"), row.get("similarity_last")
    return "" if first is None else f"{first:.2f} to {last:.2f}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
