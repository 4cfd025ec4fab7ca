# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The command `omniopd ablate`."""

import argparse
import json
import os
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from omniopd_trl.cli.ablate.plan import LOG, Job, Plan, distinct, jobs_of, read_plan
from omniopd_trl.cli.ablate.processes import Command, run_all, write
from omniopd_trl.cli.ablate.results import Result, markdown, read_result, summarize
from omniopd_trl.cli.opening import check_writable
from omniopd_trl.cli.options import apply_env, positive_int
from omniopd_trl.cli.tables import say
from omniopd_trl.errors import ConfigError, DataError, OmniOPDError


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]", omniopd: Command) -> None:
    """Add the command to the parser of `omniopd`, which runs the commands of a row."""
    parser = commands.add_parser(
        "ablate",
        help="train a grid of settings and seeds, and compare them in one table",
        description="Train every row of each plan with every seed, several runs at a time, and write a table "
        "(NAME_OF_THE_PLAN.md), a figure and all numbers (NAME_OF_THE_PLAN.json). The other rows are compared with "
        "the first by a paired test over problems. Started again, it continues: finished runs are kept, and "
        "interrupted ones are resumed from their journal and their last checkpoint, so nothing is paid twice. Plans "
        "with one --output_dir share the runs of rows with the same name and the same options.",
        allow_abbrev=False,
    )
    parser.add_argument("plans", metavar="PLAN", nargs="+", help="YAML files; recipes/plans has examples")
    parser.add_argument(
        "-o", "--output_dir", metavar="DIR", help="folder of the runs (default: runs/NAME_OF_THE_PLAN)"
    )
    parser.add_argument(
        "--jobs",
        type=positive_int,
        metavar="J",
        help="runs at a time (default: the number of GPUs, or of cores without one)",
    )
    parser.add_argument("--seeds", type=int, nargs="+", metavar="S", help="seeds, instead of those of the plan")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="only these rows, and the first")
    parser.set_defaults(call=partial(ablate, omniopd))


def ablate(omniopd: Command, options: argparse.Namespace) -> None:
    """Run the plans together, and write the results of each.

    Raises:
        ConfigError: when a plan cannot be used.
        DataError: when a run failed, after the others have ended.
        KeyboardInterrupt: as `run_all`.
    """
    plans = [read_plan(path, seeds=options.seeds, names=options.rows) for path in options.plans]
    files = [Path(options.output_dir or Path("runs", Path(path).stem), Path(path).stem) for path in options.plans]
    if twice := [str(file) for file in files if files.count(file) > 1]:
        raise ConfigError(f"Two plans would write their tables to {twice[0]}.md. Rename one of them.")
    for file in files:
        check_writable(file.parent)
    grids = [jobs_of(plan, file.parent) for plan, file in zip(plans, files, strict=True)]
    jobs = distinct(grids)
    devices = _devices()
    number = options.jobs or len(devices) or os.cpu_count() or 1
    env = _common_env(jobs)
    apply_env({"env": env or {}})  # inherited by the process that runs are forked from
    tables = [*zip(plans, grids, files, strict=True)]
    try:
        waiting = [job for job in jobs if not job.is_finished]
        failed = run_all(waiting, number, devices, env, omniopd, partial(_update, tables))
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt("The same command continues.") from error
    for plan, grid, file in tables:
        if table := _write_table(plan, grid, file):
            say(f"\n{markdown(table)}\n\nWrote {file}.json and {file}.md.")
            _draw(table, file)
    if failed:
        names = ", ".join(str(job.folder) for job in failed)
        raise DataError(f"{len(failed)} of {len(jobs)} runs failed: {names}. Read {LOG} in each, and start again.")


def _common_env(jobs: Sequence[Job]) -> Any:
    """The environment variables that all runs set; `None` where they differ, and each run sets its own."""
    env = jobs[0].recipe.get("env")
    return env if all(job.recipe.get("env") == env for job in jobs) else None


def _update(tables: Sequence[tuple[Plan, Sequence[Job], Path]], ended: Job) -> None:
    """Write the tables that a run belongs to, from the runs that have finished so far."""
    for plan, jobs, file in tables:
        if ended.is_finished and any(job.folder == ended.folder for job in jobs):
            try:
                _write_table(plan, jobs, file)
            except DataError as error:  # the command fails with it after the other runs
                say(f"{file}.md: {error}")


def _write_table(plan: Plan, jobs: Sequence[Job], file: Path) -> dict[str, Any] | None:
    """Write the table of the plan's finished runs to files with this path and their own suffixes.

    Returns:
        The table; `None` without a finished run.
    """
    results: dict[int, dict[int, Result]] = {}
    for job in jobs:
        if job.is_finished:
            results.setdefault(job.row, {})[job.seed] = read_result(job.folder)
    if not results:
        return None
    table = summarize(plan, results)
    for suffix, text in ((".json", json.dumps(table, indent=1)), (".md", markdown(table))):
        write(file.with_name(f"{file.name}{suffix}"), f"{text}\n")
    return table


def _draw(table: Mapping[str, Any], path: Path) -> None:
    """Write the figure to files with this path and their own suffixes, if matplotlib is installed."""
    from omniopd_trl.report.figures import bars

    rows = table["rows"]
    lines = [(row["name"], row["after"], row["after_std"] or 0.0, row["after_by_seed"]) for row in rows]
    before = [row["before"] for row in rows if row["before"] is not None]
    try:
        paths = bars(lines, "pass@1", path, baseline=statistics.fmean(before) if before else None)
    except OmniOPDError as error:
        say(f"No figure: {error}")
    else:
        say(f"Wrote {' and '.join(map(str, paths))}.")


def _devices() -> list[str]:
    """The GPUs that runs may use, by index; empty without one."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [device for device in visible.split(",") if device.strip() and not device.strip().startswith("-")]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]
