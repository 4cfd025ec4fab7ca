# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The report of evaluations: one self-contained HTML file, without a script.

It has the metrics of each evaluation, the paired test of the others against the first, and every problem with all
samples, the hardest first. Texts of models are untrusted, and every one is escaped.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from omniopd_trl.errors import DataError
from omniopd_trl.evals.results import FILE, SAMPLES, EvalResult, Problem, compare, is_scored, rows_of
from omniopd_trl.report.page import MIB, Section, escaped, html_table, render
from omniopd_trl.report.runs import distinct_names, text_of_prompt

# Problems that a comparison names at each end, and characters of a prompt in a line.
_NAMED, _EXCERPT = 10, 90


@dataclass(frozen=True)
class Evaluation:
    """The result of `omniopd eval`, and its samples.

    Attributes:
        name: name in the page.
        folder: its folder.
        result: its scores and settings.
    """

    name: str
    folder: Path
    result: EvalResult

    @cached_property
    def problems(self) -> dict[str, Problem]:
        """The problems by key."""
        return {problem.key: problem for problem in self.result.problems}

    @cached_property
    def lines(self) -> dict[str, dict[str, Any]]:
        """The prompt, the right answer and the samples of each problem, by its key.

        Raises:
            DataError: when the file of the samples cannot be read.
        """
        path = self.folder / SAMPLES
        try:
            with open(path, encoding="utf-8") as file:
                lines = [json.loads(line) for line in file]
            found = {line["key"]: line for line in lines}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"The samples in {str(path)!r} cannot be read ({type(error).__name__}: {error}). `omniopd eval` with "
                "the same options writes what is missing."
            ) from error
        if missing := self.problems.keys() - found.keys():
            raise DataError(f"{str(path)!r} has no samples of {len(missing)} of {len(self.problems)} problems.")
        return found


def is_evaluation(folder: str | Path) -> bool:
    """Whether a folder is the `output_dir` of `omniopd eval`."""
    return any((Path(folder) / name).exists() for name in (FILE, SAMPLES))


def open_evaluations(folders: Sequence[str | Path]) -> list[Evaluation]:
    """The evaluations in these folders, with distinct names.

    Raises:
        DataError: when one is not finished, or cannot be read.
    """
    names = distinct_names(folders)
    return [Evaluation(name, Path(f), EvalResult.load(f)) for name, f in zip(names, folders, strict=True)]


def write_evaluations(evaluations: Sequence[Evaluation], *, max_mib: float = 24.0) -> str:
    """The report as HTML.

    Args:
        evaluations: one evaluation, or several. The others are compared with the first.
        max_mib: limit of the problems and their samples, in MiB. If there are more, the hardest problems are shown,
            and the page says how many were left out.

    Raises:
        DataError: when the samples cannot be read.
    """
    sections = [Section("summary", "Summary", _summary(evaluations))]
    if len(evaluations) > 1:
        sections.append(Section("comparison", "Comparison", _comparisons(evaluations)))
    sections.append(Section("problems", "Problems", _problems(evaluations, round(max_mib * MIB))))
    return render("Evaluation: " + ", ".join(each.name for each in evaluations), sections)


def _summary(evaluations: Sequence[Evaluation]) -> str:
    columns = [dict(rows_of(each.result)) for each in evaluations]
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = [[name, *(column.get(name, "") for column in columns)] for name in names]
    described = [each.result.settings | each.result.versions for each in evaluations]
    settings = [
        f"<details><summary>All settings of {escaped(each.name)}</summary>"
        f"{html_table((), [[name, _plain(value)] for name, value in values.items()])}</details>"
        for each, values in zip(evaluations, described, strict=True)
    ]
    return html_table(["", *(each.name for each in evaluations)], rows) + "\n" + "\n".join(settings)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _comparisons(evaluations: Sequence[Evaluation]) -> str:
    first = evaluations[0]
    parts, rows = [], []
    for other in evaluations[1:]:
        try:
            comparison = compare(other.result, first.result)
        except DataError as error:
            parts.append(f"<p>{escaped(other.name)} is not compared: {escaped(error)}</p>")
            continue
        low, high = comparison.test.interval
        differs = ", ".join(
            f"{name}: {_plain(theirs)} and {_plain(ours)}"[:200]
            for name, (ours, theirs) in comparison.differences.items()
        )
        rows.append(
            [
                other.name,
                f"{comparison.test.difference:+.3f} [{low:+.3f}, {high:+.3f}]",
                f"{comparison.test.p_value:.4f}",
                f"{comparison.num_better} better, {comparison.num_worse} worse of {comparison.num_problems}",
                differs or "nothing but the model",
            ]
        )
        parts.append(_ends(first, other))
    titles = ["", f"difference to {first.name}", "p, paired by problem", "problems", "settings that differ"]
    return (html_table(titles, rows) if rows else "") + "\n" + "\n".join(parts)


def _ends(first: Evaluation, other: Evaluation) -> str:
    """The problems where a result differs most from the first, with links."""
    shared = first.problems.keys() & other.problems.keys()
    scored = [key for key in shared if is_scored(first.problems[key]) and is_scored(other.problems[key])]
    changes = sorted((_mean(other, key) - _mean(first, key), key) for key in scored)
    parts = []
    for word, chosen in (("worse", changes[:_NAMED]), ("better", changes[::-1][:_NAMED])):
        items = [
            f'<li><a href="#p-{escaped(key)}">{escaped(_title(first, key))}</a> '
            f"{_mean(first, key):.2f} → {_mean(other, key):.2f}</li>"
            for change, key in chosen
            if change and (change > 0) == (word == "better")
        ]
        if items:
            parts.append(f"<h3>Where {escaped(other.name)} is {word}</h3>\n<ul>{''.join(items)}</ul>")
    return "\n".join(parts)


def _mean(evaluation: Evaluation, key: str) -> float:
    scores = [score for score in evaluation.problems[key].scores if score is not None]
    return sum(scores) / len(scores) if scores else 0.0


def _title(evaluation: Evaluation, key: str) -> str:
    problem = evaluation.problems[key]
    prompt = " ".join(text_of_prompt(evaluation.lines[key]["prompt"]).split())
    text = prompt if len(prompt) <= _EXCERPT else f"… {prompt[-_EXCERPT:]}"
    return text if problem.id is None else f"{problem.id}: {text}"


def _problems(evaluations: Sequence[Evaluation], limit: int) -> str:
    has: dict[str, list[Evaluation]] = {}
    for each in evaluations:
        for key in each.problems:
            has.setdefault(key, []).append(each)
    # The hardest first. The order of the set decides between problems of one score.
    ordered = sorted(has, key=lambda key: sum(_mean(each, key) for each in has[key]) / len(has[key]))
    shown: list[str] = []
    size = 0
    for key in ordered:
        text = "".join(_problem(key, has[key]))
        size += len(text.encode())
        if shown and size > limit:
            break
        shown.append(text)
    left_out = ""
    if len(shown) < len(ordered):
        kept = f"the {len(shown):,} hardest of {len(ordered):,} problems"
        left_out = f'<p id="left-out">This file holds {kept}. Raise --max_mib for more.</p>'
    about = "The hardest first, each with the share of right samples. Open a problem for its prompt and all samples."
    return f'<p class="muted">{about}</p>\n{left_out}\n' + "\n".join(shown)


def _problem(key: str, evaluations: Sequence[Evaluation]) -> Iterator[str]:
    line = evaluations[0].lines[key]
    means = ", ".join(f"{_mean(each, key):.2f}" for each in evaluations)
    right = next((line[name] for name in ("answer", "solution") if line.get(name) is not None), None)
    yield f'<details class="problem"><summary>{means} &nbsp; {escaped(_title(evaluations[0], key))}</summary>\n'
    # A link to an element inside opens the details.
    yield f'<div id="p-{escaped(key)}"><h3>Prompt</h3><p class="prompt">{escaped(text_of_prompt(line["prompt"]))}</p>'
    if right is not None:
        yield f'<h3>Right answer</h3><p class="text">{escaped(right)}</p>'
    for each in evaluations:
        yield f"<h3>{escaped(each.name)}</h3><ol>"
        problem = each.problems[key]
        for index, sample in enumerate(each.lines[key]["samples"]):
            yield f'<li><p class="muted">{escaped(_verdict(problem, index))}</p>'
            yield f'<p class="text">{escaped(sample["text"])}</p></li>'
        yield "</ol>"
    yield "</div></details>"


def _verdict(problem: Problem, index: int) -> str:
    """The score of a sample, the answer that was read, and what happened to it."""
    score, answer = problem.scores[index], problem.answers[index]
    words = ["not scored" if score is None else {1.0: "right", 0.0: "wrong"}.get(score, f"score {score:.3f}")]
    words += [] if answer is None else [f"answer {answer}"]
    words += [f"{name} {value[index]:.3f}" for name, value in problem.rewards.items() if value[index] is not None]
    words += ["cut at the maximum length"] if problem.truncated[index] else []
    words += [] if problem.answered[index] else ["refused, filtered or empty"]
    words += ["could not be scored in time"] if problem.timed_out[index] else []
    return "; ".join(words)
