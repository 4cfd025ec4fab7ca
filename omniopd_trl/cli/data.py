# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""`omniopd data`: the named sets, and evaluation problems that are in the training data."""

import argparse
import json
import sys
from dataclasses import asdict
from typing import Any

from omniopd_trl.cli.options import number, resolve_demo_name
from omniopd_trl.cli.tables import columns


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser of `omniopd`."""
    data = commands.add_parser(
        "data",
        help="list the named sets, or look for evaluation problems in the training data",
        description="List the named training and evaluation sets, or look for evaluation problems in the training "
        "data.",
        allow_abbrev=False,
    )
    actions = data.add_subparsers(dest="action", metavar="ACTION", required=True)
    listing = actions.add_parser(
        "list",
        help="list the named sets, with source and license",
        description="List the named sets.",
        allow_abbrev=False,
    )
    listing.set_defaults(call=lambda options: list_sets())
    check = actions.add_parser(
        "check",
        help="look for evaluation problems that are in the training data",
        description="Report evaluation problems that are also, or nearly, in the training data. Both are a named set "
        "(`omniopd data list`), `reasoning_gym:TASK`, a file or folder, or an id on the Hub.",
        allow_abbrev=False,
    )
    check.add_argument("training", metavar="TRAINING", help="the training set")
    check.add_argument("evaluation", metavar="EVALUATION", help="the evaluation set")
    check.add_argument("--train_split", metavar="SPLIT", help="split of TRAINING (default: the set's own, or train)")
    check.add_argument("--test_split", metavar="SPLIT", help="split of EVALUATION (default: the set's own, or test)")
    check.add_argument(
        "--threshold",
        type=number("a number above 0 and at most 1", lambda value: 0 < value <= 1),
        default=0.8,
        metavar="S",
        help="lowest similarity that is reported: the share of an evaluation problem's words that the training "
        "problem has in the same order (default: 0.8)",
    )
    check.add_argument("--json", action="store_true", help="print one JSON list")
    check.set_defaults(call=check_sets)


def list_sets() -> None:
    """Print the named sets."""
    from omniopd_trl.data.sets import BENCHMARKS

    rows = [("name", "purpose", "scored by", "source", "license")]
    rows += [(name, it.purpose, it.scorer, it.source, it.license) for name, it in BENCHMARKS.items()]
    sys.stdout.write("\n".join(columns(rows, str.ljust)) + "\n")


def check_sets(options: argparse.Namespace) -> None:
    """Print the near-duplicates.

    Raises:
        ConfigError, DataError: when a set cannot be loaded.
    """
    from omniopd_trl.data.benchmarks import questions_of
    from omniopd_trl.data.duplicates import near_duplicates

    training = questions_of(resolve_demo_name(options.training), options.train_split, "train")
    evaluation = questions_of(resolve_demo_name(options.evaluation), options.test_split, "test")
    pairs = near_duplicates(training, evaluation, options.threshold)
    if options.json:
        rows: list[dict[str, Any]] = [
            {**asdict(pair), "evaluation_text": evaluation[pair.evaluation], "training_text": training[pair.training]}
            for pair in pairs
        ]
        sys.stdout.write(json.dumps(rows, indent=2) + "\n")
        return
    for pair in pairs:
        others = f", and {pair.others:,} other rows" if pair.others else ""
        sys.stdout.write(
            f"{pair.similarity:.2f}  {options.evaluation} row {pair.evaluation}: {_cut(evaluation[pair.evaluation])}\n"
            f"      {options.training} row {pair.training}{others}: {_cut(training[pair.training])}\n"
        )
    sys.stdout.write(
        f"{len(pairs):,} of {len(evaluation):,} problems of {options.evaluation} are near-duplicates of the "
        f"{len(training):,} problems of {options.training} (similarity of at least {options.threshold:g}).\n"
    )


def _cut(text: str) -> str:
    line = " ".join(text.split())
    # A text of a data set must not control the terminal.
    line = "".join(character for character in line if character.isprintable())
    return line if len(line) <= 150 else line[:147] + "..."
