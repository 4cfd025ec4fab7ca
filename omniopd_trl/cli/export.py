# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""`omniopd export`: a run's audits as a dataset."""

import argparse
import sys
from pathlib import Path

from omniopd_trl.errors import ConfigError


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser of `omniopd`."""
    parser = commands.add_parser(
        "export",
        help="write a run's trajectories and rollouts as a dataset, and push it to the Hub",
        description="Write the trajectories and rollouts of a run as a dataset: Parquet files with a card, which "
        "`datasets.load_dataset` reads. Another run can train from it without a teacher, with "
        "`teacher_model_name_or_path: export:DIR`. The run may still be writing.",
        allow_abbrev=False,
    )
    parser.add_argument("folder", metavar="RUN_DIR", help="the `output_dir` of a run")
    parser.add_argument(
        "-o",
        "--output",
        metavar="DIR",
        help="folder of the dataset (default: _export in RUN_DIR, which is not pushed with the model)",
    )
    parser.add_argument("--push", metavar="REPO_ID", help="also push it to this dataset repository on the Hub")
    parser.add_argument("--private", action="store_true", help="create the repository of --push as a private one")
    parser.set_defaults(call=export)


def export(options: argparse.Namespace) -> None:
    """Write the dataset, and push it if asked.

    Raises:
        ConfigError: when the folder holds something else, or --private is given without --push.
        DataError: when the run has no audits.
        JournalError: when a journal cannot be read.
        PushError: when the push fails.
    """
    if options.private and options.push is None:
        raise ConfigError("--private has no effect without --push REPO_ID. Leave it out, or push.")
    from omniopd_trl.report.export import obstacle, push_export, training_options, write_export
    from omniopd_trl.report.runs import Run

    run = Run(options.folder)
    folder = Path(options.output or run.folder / "_export")
    about = write_export(run, folder)
    sys.stdout.write(
        f"Wrote {about['num_trajectories']:,} trajectories with {about['num_chunks']:,} chunks and "
        f"{about['num_rollouts']:,} rollouts to {folder}.\n"
    )
    if options.push is not None:
        address = push_export(folder, options.push, private=options.private)
        sys.stdout.write(f"Pushed it to {address}.\n")
    if about["mixed"]:
        sys.stdout.write(f"These settings changed between its steps: {', '.join(about['mixed'])}.\n")
    if (held := obstacle(about)) is not None:
        sys.stdout.write(f"It holds {held}, so no run can train from it.\n")
    else:
        sys.stdout.write(f"Train from it with: {training_options(about, str(folder))}\n")
