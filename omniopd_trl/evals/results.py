# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Results of an evaluation: the scores of all samples, what follows from them, and the comparison of two results."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from omniopd_trl.errors import DataError
from omniopd_trl.evals.statistics import PairedTest, bootstrap_interval, majority_at_k, paired_test, pass_at_k

# Raise it when a field changes its meaning or is removed.
SCHEMA = 1
FILE, SAMPLES = "results.json", "samples.jsonl"

# Settings that two results may differ in without being measured differently: what is compared, and where it ran.
_COMPARED = (
    "model",
    "weights",
    "revision",
    "dtype",
    "parameters",
    "served_models",
    "max_batch_tokens",
    "chat_template",
    "base_url",
)


@dataclass(frozen=True)
class Problem:
    """One problem of an evaluation. Each list has one entry per sample.

    Attributes:
        key: hash of the right answer and of `id`, or of the prompt if the set has no ids. It identifies the problem in
            results of other models.
        id: the dataset's `id`; `None` if it has none.
        scores: score of each sample, 1.0 for a right answer; `None` where the right answer cannot be read.
        answers: what was read as the answer of each sample, as [`~omniopd_trl.evals.math.as_votes`] writes it; `None`
            without a readable answer, and for custom reward functions.
        truncated: whether each sample was cut at the maximum length.
        answered: whether the model gave the sample. A service may refuse it, or filter it.
        timed_out: whether the scorer had to be stopped. The sample counts as wrong.
        characters: length of each sample in characters.
        tokens: tokens of all samples together, in the model's tokens; `None` when they are not known.
        rewards: scores of each function by the name of its metric, `pass@1/NAME`; empty for a single function.
    """

    key: str
    id: str | None
    scores: list[float | None]
    answers: list[str | None]
    truncated: list[bool]
    answered: list[bool]
    timed_out: list[bool]
    characters: list[int]
    tokens: int | None
    rewards: dict[str, list[float | None]] = field(default_factory=dict)


@dataclass(frozen=True)
class EvalResult:
    """The result of an evaluation.

    Attributes:
        problems: the `P` problems, in the order of the dataset, each with `n` samples.
        settings: model, engine, dataset, sampling and seed.
        versions: versions of the packages that were used.
        reads_answers: whether answers were read. Custom reward functions only return scores.
        cost: `prompt_tokens`, `completion_tokens` and `usd` (`None` without a price) of a teacher behind a service,
            over all runs in the folder; empty for other models.
        metrics: what [`metrics_of`] computes.
    """

    problems: list[Problem]
    settings: dict[str, Any]
    versions: dict[str, str]
    reads_answers: bool = True
    cost: dict[str, Any] = field(default_factory=dict)

    @cached_property  # the bootstrap of 50,000 problems takes seconds
    def metrics(self) -> dict[str, Any]:
        return metrics_of(self.problems, self.reads_answers)

    def scores(self) -> list[list[float]]:
        """`(P', n)`, the scores of the `P'` problems whose right answer can be read."""
        return [[s for s in problem.scores if s is not None] for problem in self.problems if is_scored(problem)]

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write `results.json`, all or nothing, and return its path."""
        path = Path(folder, FILE)
        write_json(path, {"schema": SCHEMA, "metrics": self.metrics, **asdict(self)})
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "EvalResult":
        """Read `results.json`, or the folder that holds it.

        Raises:
            DataError: when there is no result, or it is of another version.
        """
        file = Path(path, FILE) if Path(path).is_dir() else Path(path)
        try:
            values = json.loads(file.read_text("utf-8"))
            schema = values.get("schema")
            if schema == SCHEMA:
                problems = [Problem(**problem) for problem in values["problems"]]
                rest = {f.name: values[f.name] for f in fields(cls) if f.name != "problems"}
                return cls(problems, **rest)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
            raise DataError(
                f"{str(file)!r} holds no result of an evaluation ({reason}). Name the `output_dir` of `omniopd eval`; "
                "an evaluation that was interrupted is finished by the same command."
            ) from error
        raise DataError(
            f"{str(file)!r} has the schema {schema!r}, and this version reads {SCHEMA}. Evaluate again: the samples "
            "are kept, and only scored."
        )


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a file of JSON, all or nothing."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps(values, ensure_ascii=False) + "\n", "utf-8")
    new.replace(path)


def is_scored(problem: Problem) -> bool:
    """Whether all samples have a score, that is, whether the right answer can be read."""
    return None not in problem.scores


def nothing_to_score(num_problems: int) -> DataError:
    """The error of a set without any right answer."""
    return DataError(
        f"None of {num_problems} problems has a right answer that can be read. Check the `answer` column."
    )


def metrics_of(problems: Sequence[Problem], reads_answers: bool = True) -> dict[str, Any]:
    """What an evaluation reports. Shares are of all samples of the scored problems.

    Args:
        problems: the problems.
        reads_answers: whether answers were read.

    Returns:
        `num_problems`, `num_samples` per problem, and `num_not_scored`: problems whose right answer cannot be read,
        which count in nothing else. `pass@1`, the mean score, with `interval`, its 95% confidence interval by
        bootstrap over problems; for scores of 0 and 1 also `pass@k` for the powers of two up to `n`, without bias, and
        `majority@n`. The shares `truncated`, `without_answer` (none can be read) and `not_given` (the model gave no
        sample), the number `num_timed_out`, `mean_characters` and `mean_tokens` (`None` when they are not known).

    Raises:
        DataError: when no problem has a score.
    """
    scored = [problem for problem in problems if is_scored(problem)]
    if not scored:
        raise nothing_to_score(len(problems))
    scores = [[s for s in problem.scores if s is not None] for problem in scored]
    n = len(scores[0])
    metrics: dict[str, Any] = {
        "num_problems": len(scored),
        "num_samples": n,
        "num_not_scored": len(problems) - len(scored),
        "pass@1": float(sum(map(sum, scores)) / (len(scores) * n)),
        "interval": list(bootstrap_interval(scores)),
    }
    if all(score in (0.0, 1.0) for row in scores for score in row):
        metrics |= {f"pass@{2**i}": pass_at_k(scores, 2**i) for i in range(1, int(math.log2(n)) + 1)}
        if reads_answers and n > 1:
            metrics[f"majority@{n}"] = majority_at_k([problem.answers for problem in scored], scores, n)
    for name in scored[0].rewards:
        given = [score for problem in scored for score in problem.rewards[name] if score is not None]
        metrics[name] = sum(given) / len(given) if given else None
    answers = [answer for problem in scored for answer in problem.answers]
    if reads_answers:
        metrics["without_answer"] = answers.count(None) / len(answers)
    tokens = [problem.tokens for problem in scored if problem.tokens is not None]
    return metrics | {
        "truncated": _share(problem.truncated for problem in scored),
        "not_given": 1 - _share(problem.answered for problem in scored),
        "num_timed_out": sum(sum(problem.timed_out) for problem in scored),
        "mean_characters": sum(sum(problem.characters) for problem in scored) / (len(scored) * n),
        "mean_tokens": sum(tokens) / (len(tokens) * n) if tokens else None,
    }


def _share(rows: Any) -> float:
    values = [value for row in rows for value in row]
    return sum(values) / len(values)


@dataclass(frozen=True)
class Comparison:
    """The comparison of two results on the same problems.

    Attributes:
        first: `pass@1` of the first result.
        second: `pass@1` of the second result.
        test: the paired test of their difference, `first - second`.
        num_better: problems with a higher mean score in the first result.
        num_worse: problems with a lower mean score in the first result.
        num_problems: problems that both have scored.
        differences: the settings in which the results differ, besides the model: the two values by name.
    """

    first: float
    second: float
    test: PairedTest
    num_better: int
    num_worse: int
    num_problems: int
    differences: dict[str, tuple[Any, Any]]


def compare(first: EvalResult, second: EvalResult) -> Comparison:
    """Compare two results on the same problems. Their numbers of samples may differ.

    Args:
        first: one result. The difference is positive when its scores are higher.
        second: the other result.

    Raises:
        DataError: when they hold different problems, or have scored none in common.
    """
    ours, theirs = ({problem.key: problem for problem in result.problems} for result in (first, second))
    if ours.keys() != theirs.keys():
        raise DataError(
            f"The results hold different problems: {len(ours.keys() - theirs.keys())} are in the first only, "
            f"{len(theirs.keys() - ours.keys())} in the second only, and {len(ours.keys() & theirs.keys())} in both. "
            "Evaluate both models on the same set. Problems of a set without an `id` column are known by their prompt."
        )
    keys = [key for key in ours if is_scored(ours[key]) and is_scored(theirs[key])]
    a, b = ([_mean(problems[key]) for key in keys] for problems in (ours, theirs))
    if not keys:
        raise DataError("The results have no problem in common that both have scored.")
    names = sorted({*first.settings, *second.settings} - {*_COMPARED})
    return Comparison(
        first=sum(a) / len(a),
        second=sum(b) / len(b),
        test=paired_test(a, b),
        num_better=sum(x > y for x, y in zip(a, b, strict=True)),
        num_worse=sum(x < y for x, y in zip(a, b, strict=True)),
        num_problems=len(keys),
        differences={
            name: (first.settings.get(name), second.settings.get(name))
            for name in names
            if first.settings.get(name) != second.settings.get(name)
        },
    )


def _mean(problem: Problem) -> float:
    scores = [score for score in problem.scores if score is not None]
    return sum(scores) / len(scores)


def table_of(result: EvalResult) -> str:
    """The metrics as lines of text."""
    return aligned(rows_of(result))


def rows_of(result: EvalResult) -> list[tuple[str, str]]:
    """The metrics as names and values for people."""
    metrics = result.metrics
    low, high = metrics["interval"]
    known = result.settings.get("teacher_context")
    context = [] if known is None else [("in its prompt", f"the column {known[0]!r}")]
    rows = [
        ("model", str(result.settings.get("model"))),
        *context,
        ("problems x samples", f"{metrics['num_problems']} x {metrics['num_samples']}"),
        ("pass@1", f"{metrics['pass@1']:.3f}, 95% interval {low:.3f} to {high:.3f}"),
    ]
    rows += [
        (name, f"{value:.3f}")
        for name, value in metrics.items()
        if name.startswith(("pass@", "majority@")) and name != "pass@1" and value is not None
    ]
    if result.reads_answers:
        reading = "lenient" if result.settings.get("lenient") else "strict"
        rows.append(("without a readable answer", f"{metrics['without_answer']:.3f} ({reading} reading)"))
    rows.append(("truncated", f"{metrics['truncated']:.3f}"))
    tokens = "" if metrics["mean_tokens"] is None else f"{metrics['mean_tokens']:.1f} tokens, "
    rows.append(("mean length", f"{tokens}{metrics['mean_characters']:.0f} characters"))
    if metrics["not_given"]:
        rows.append(("refused, filtered or empty", f"{metrics['not_given']:.3f}"))
    if metrics["num_timed_out"]:
        rows.append(("could not be scored in time", f"{metrics['num_timed_out']} samples, which count as wrong"))
    if metrics["num_not_scored"]:
        rows.append(("left out", f"{metrics['num_not_scored']} problems, whose right answer cannot be read"))
    if result.cost:
        usd = result.cost["usd"]
        dollars = "" if usd is None else f", ${usd:.4f}"
        read, written = result.cost["prompt_tokens"], result.cost["completion_tokens"]
        rows.append(("teacher", f"{read:,} tokens read, {written:,} written{dollars}"))
    return rows


def table_of_comparison(comparison: Comparison, names: tuple[str, str]) -> str:
    """The comparison as lines of text.

    Args:
        comparison: the comparison.
        names: names of the two results.
    """
    low, high = comparison.test.interval
    rows = [
        (f"pass@1 of {names[0]}", f"{comparison.first:.3f}"),
        (f"pass@1 of {names[1]}", f"{comparison.second:.3f}"),
        ("difference", f"{comparison.test.difference:+.3f}, 95% interval {low:+.3f} to {high:+.3f}"),
        ("p-value, paired by problem", f"{comparison.test.p_value:.4f}"),
        ("problems", f"{comparison.num_problems}: {comparison.num_better} better, {comparison.num_worse} worse"),
    ]
    rows += [
        (f"differs: {name}", f"{_short(ours)} and {_short(theirs)}")
        for name, (ours, theirs) in comparison.differences.items()
    ]
    return aligned(rows)


def as_json(comparison: Comparison) -> Mapping[str, Any]:
    """The comparison as values for JSON."""
    values = asdict(comparison)
    return values | {"test": comparison.test._asdict() | {"interval": list(comparison.test.interval)}}


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def aligned(rows: Sequence[tuple[str, str]]) -> str:
    """Names and values in two columns."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
