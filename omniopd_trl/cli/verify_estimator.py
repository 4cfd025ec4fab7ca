# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""`omniopd verify-estimator`: how well rollouts estimate the probabilities of a local teacher (Table 3)."""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from omniopd_trl.cli.options import positive_int, resolve_demo_name
from omniopd_trl.errors import ConfigError, DataError

if TYPE_CHECKING:
    from omniopd_trl.evals.estimator import Accuracy
    from omniopd_trl.journal.browse import AuditedTrajectory
    from omniopd_trl.teachers.local import LocalTeacher

# The similarities of Table 3, in its order.
SIMILARITIES = ("rouge1", "rougeL", "jaccard", "bleu1", "bleu2", "edit", "exact")


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser of `omniopd`."""
    parser = commands.add_parser(
        "verify-estimator",
        help="compare the estimates of a recorded run with its local teacher's probabilities (Table 3)",
        description="Compare two estimates of the teacher's support for a chunk, the mean similarity k_sem / N and "
        "the posterior mean (Eq. 5), with the probability that the teacher gives to the chunk: mean squared error and "
        "Pearson correlation, with 95% intervals by bootstrap over trajectories. Chunks and rollouts are those that "
        "a run with a local teacher recorded. For Table 3, record with `--learning_rate 0 --num_rollouts 20`.",
        allow_abbrev=False,
    )
    parser.add_argument("folder", metavar="RUN_DIR", help="the `output_dir` of a run with a local teacher")
    parser.add_argument("--teacher", metavar="MODEL", help="path or id of the teacher (default: that of the run)")
    parser.add_argument(
        "--similarity",
        nargs="+",
        default=list(SIMILARITIES),
        metavar="NAME",
        help=f"similarities to compare (default: {' '.join(SIMILARITIES)})",
    )
    parser.add_argument(
        "--num_rollouts",
        nargs="+",
        type=positive_int,
        metavar="N",
        help="numbers of rollouts to compare, the first N of each chunk (default: all that were recorded)",
    )
    parser.add_argument(
        "--prior_strength", type=float, metavar="ALPHA", help="prior strength (default: that of the run)"
    )
    parser.add_argument(
        "--max_trajectories", type=positive_int, metavar="K", help="use K trajectories, evenly spaced (default: all)"
    )
    parser.add_argument("-o", "--output", metavar="FILE", help="also write the table as JSON")
    parser.set_defaults(call=verify_estimator)


def verify_estimator(options: argparse.Namespace) -> None:
    """Print the table.

    Raises:
        ConfigError: when an option is out of range.
        DataError: when the run has no audits, or too few rollouts, or its teacher is not a local model.
        JournalError: when the journal cannot be read.
    """
    from rich.console import Console

    from omniopd_trl.method.posterior import posterior_mean
    from omniopd_trl.method.similarity import get_similarity
    from omniopd_trl.report.runs import Run, without_folders

    for name in options.similarity:
        get_similarity(name)
    output = None if options.output is None else Path(options.output)
    if output is not None and (output.is_dir() or not output.absolute().parent.is_dir()):
        raise ConfigError(f"--output is {str(output)!r}, where no file can be. Name a file in a folder that exists.")
    run = Run(options.folder)
    settings = run.settings
    alpha = settings.get("prior_strength", 1.0) if options.prior_strength is None else options.prior_strength
    posterior_mean(0.0, 1, 0.0, alpha)  # refuses a wrong alpha before the teacher is loaded
    trajectories = list(_read(run, options.max_trajectories))
    if not any(trajectory.chunks for trajectory in trajectories):
        raise DataError(f"{options.folder} holds no audited chunk yet.")
    most = min(len(chunk.rollouts) for trajectory in trajectories for chunk in trajectory.chunks)
    if most == 0:
        raise DataError(
            f"{options.folder} holds chunks with a mark and no rollouts. Record a run with `--signal rollouts`."
        )
    counts = options.num_rollouts or [most]
    if max(counts) > most:
        raise ConfigError(
            f"--num_rollouts is {' '.join(map(str, counts))}, but a chunk of {options.folder} has only {most}. Give "
            f"at most {most}, or record a run with `--num_rollouts {max(counts)}`."
        )
    if (top_p := settings.get("teacher_top_p", 1.0)) < 1:
        raise DataError(
            f"{options.folder} was recorded with teacher_top_p={top_p:g}, so its rollouts are not drawn with the "
            "probabilities of the teacher. Record a run with `--teacher_top_p 1`."
        )
    template = settings.get("teacher_context_template")
    teacher = _load_teacher(options, settings)
    logprobs = _teacher_logprobs(teacher, trajectories, settings["teacher_temperature"], template)
    table = compare(trajectories, logprobs, options.similarity, counts, alpha)
    about = {
        "run": run.name,
        "teacher": without_folders(options.teacher or settings["teacher_model_name_or_path"]),
        "chunk_selection": settings.get("chunk_selection"),
        "chunk_length": settings.get("chunk_length"),
        "prior_strength": alpha,
        "num_chunks": sum(len(values) > 0 for values in logprobs),
        "num_trajectories": sum(bool(trajectory.chunks) for trajectory in trajectories),
    }
    _print(Console(), about, table)
    if output is not None:
        output.write_text(json.dumps({**about, "rows": table}, indent=2) + "\n", "utf-8")
        sys.stdout.write(f"Wrote {options.output}.\n")


def compare(
    trajectories: "Sequence[AuditedTrajectory]",
    logprobs: Sequence[Sequence[float]],
    similarities: Sequence[str],
    counts: Sequence[int],
    prior_strength: float,
) -> list[dict[str, Any]]:
    """The rows of the table.

    Args:
        trajectories: audited trajectories.
        logprobs: the teacher's log-probabilities of the tokens of each chunk, for the chunks of all trajectories in
            order. Chunks without tokens of the teacher are left out.
        similarities: names of similarities.
        counts: numbers of rollouts.
        prior_strength: alpha of Eq. 5.

    Returns:
        One row for each truth, similarity and number of rollouts, and one for the prior alone, which asks nothing.
    """
    from omniopd_trl.evals.estimator import Truth, accuracy, true_support
    from omniopd_trl.method.posterior import posterior_mean
    from omniopd_trl.method.similarity import similarity_matrix

    pairs = [(group, chunk) for group, trajectory in enumerate(trajectories) for chunk in trajectory.chunks]
    kept = [(group, chunk, values) for (group, chunk), values in zip(pairs, logprobs, strict=True) if len(values)]
    groups = [group for group, _, _ in kept]
    priors = [chunk.prior for _, chunk, _ in kept]
    texts, rollouts = [chunk.text for _, chunk, _ in kept], [chunk.rollouts for _, chunk, _ in kept]
    matrices = {name: similarity_matrix(texts, rollouts, name) for name in similarities}
    rows = []
    for truth in get_args(Truth):
        support = true_support([values for _, _, values in kept], truth)
        rows.append({"truth": truth, "estimate": "prior"} | _numbers(accuracy(priors, support, groups)))
        for name, matrix in matrices.items():
            for count in counts:
                sums = [sum(row[:count]) for row in matrix]
                estimates = {
                    "frequentist": [value / count for value in sums],
                    "bayesian": [
                        float(posterior_mean(value, count, prior, prior_strength))
                        for value, prior in zip(sums, priors, strict=True)
                    ],
                }
                rows += [
                    {"truth": truth, "estimate": estimate, "similarity": name, "num_rollouts": count}
                    | _numbers(accuracy(values, support, groups))
                    for estimate, values in estimates.items()
                ]
    return rows


def _numbers(result: "Accuracy") -> dict[str, Any]:
    values = {
        "mse": result.mse,
        "mse_interval": [*result.mse_interval],
        "correlation": result.correlation,
        "correlation_interval": [*result.correlation_interval],
    }
    # JSON has no NaN.
    if math.isnan(result.correlation):
        values |= {"correlation": None, "correlation_interval": None}
    return values


def _read(run: Any, most: int | None) -> "Iterator[AuditedTrajectory]":
    from omniopd_trl.journal.browse import read_audits

    places = run.places
    if most is not None and most < len(places):
        places = [places[index * len(places) // most] for index in range(most)]
    yield from read_audits(run.folder, places)


def _load_teacher(options: argparse.Namespace, settings: dict[str, Any]) -> "LocalTeacher":
    from omniopd_trl.teachers import load_teacher
    from omniopd_trl.teachers.local import LocalTeacher
    from omniopd_trl.teachers.options import TeacherOptions

    name = resolve_demo_name(options.teacher) or settings.get("teacher_model_name_or_path")
    if not name:
        raise DataError(f"{options.folder} does not say what its teacher is. Name it with `--teacher MODEL`.")
    given = {key: settings[key] for key in TeacherOptions.__dataclass_fields__ if settings.get(key) is not None}
    teacher = load_teacher(name, TeacherOptions(**given))
    if not isinstance(teacher, LocalTeacher):
        raise DataError(
            f"The probabilities of the teacher {name!r} are not known: it is not a local model. Name one with "
            "`--teacher MODEL` if the run's teacher served the same weights."
        )
    return teacher


def _teacher_logprobs(
    teacher: "LocalTeacher",
    trajectories: "Sequence[AuditedTrajectory]",
    temperature: float,
    template: str | None,
) -> list[list[float]]:
    from omniopd_trl.teachers.base import Prefix
    from omniopd_trl.teachers.context import with_context

    prefixes, texts = [], []
    for trajectory in trajectories:
        prompt = with_context(trajectory.prompt, trajectory.teacher_context, template)
        prefixes += [Prefix(prompt, chunk.prefix) for chunk in trajectory.chunks]
        texts += [chunk.text for chunk in trajectory.chunks]
    # A greedy teacher samples the mode of the distribution at temperature 1.
    return [row.tolist() for row in teacher.logprobs(prefixes, texts, temperature or 1.0)]


def _print(console: Any, about: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    from rich.table import Table

    console.print(
        f"{about['num_chunks']} chunks of {about['num_trajectories']} trajectories, selected by "
        f"{about['chunk_selection']}; teacher {about['teacher']}, alpha {about['prior_strength']:g}"
    )
    titles = {"geometric": "Truth: probability per token", "total": "Truth: probability of the chunk"}
    by_place: dict[tuple[str, Any, Any], dict[str, dict[str, Any]]] = {}
    for row in rows:
        place = (row["truth"], row.get("similarity"), row.get("num_rollouts"))
        by_place.setdefault(place, {})[row["estimate"]] = row
    for truth, title in titles.items():
        table = Table(title=title, title_justify="left", box=None)
        for column in ("similarity", "N", "MSE k_sem/N", "MSE posterior", "r k_sem/N", "r posterior"):
            table.add_column(column, justify="left" if column == "similarity" else "right", no_wrap=True)
        for (place_truth, similarity, count), found in by_place.items():
            if place_truth != truth:
                continue
            if similarity is None:
                table.add_row("(prior)", "0", "", _mse(found["prior"]), "", _correlation(found["prior"]))
            else:
                pair = found["frequentist"], found["bayesian"]
                table.add_row(similarity, str(count), *map(_mse, pair), *map(_correlation, pair))
        console.print(table)


def _mse(row: dict[str, Any]) -> str:
    return _with_error(row["mse"], row["mse_interval"], 4)


def _correlation(row: dict[str, Any]) -> str:
    return "-" if row["correlation"] is None else _with_error(row["correlation"], row["correlation_interval"], 2)


def _with_error(value: float, interval: list[float], digits: int) -> str:
    """A value and half the width of its interval."""
    return f"{value:.{digits}f} ± {(interval[1] - interval[0]) / 2:.{digits}f}"
