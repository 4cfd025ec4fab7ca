# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""`omniopd ablate`: train a grid of settings and seeds, and compare the results in one table and one figure."""

import argparse
import json
import multiprocessing
import os
import re
import signal
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import connection, resource_tracker
from pathlib import Path
from typing import Any

from omniopd_trl.cli.options import (
    SECTIONS,
    apply_env,
    check_method_name,
    check_names,
    check_options,
    check_recipe,
    option_hints,
    parse_section,
    positive_int,
)
from omniopd_trl.cli.recipes import recipe_files
from omniopd_trl.cli.train import ControlC
from omniopd_trl.errors import ConfigError, DataError, OmniOPDError
from omniopd_trl.journal.file import journals_of

# Written when a run has ended well, in its folder.
FINISHED, RECIPE, LOG = "finished.json", "recipe.yaml", "log.txt"
# Options of `omniopd solutions`, for a run that collects them.
SOLUTIONS = "solutions.yaml"

# What a run imports, some eight seconds of a processor. Without a GPU, runs are forked from a process that has them.
_IMPORTED = ("omniopd_trl.cli.recipe", "omniopd_trl.trainer.omniopd_trainer", "omniopd_trl.baselines.make")

_PLAN_KEYS = ("config", "seeds", "options", "rows")
_ROW_KEYS = ("name", "options", "solutions")
_SOLUTIONS_KEYS = ("num_solutions", "batch", "verified", "num_prompts")
# Fields of a result that a row has the mean of.
_AVERAGED = (
    *("before", "after", "kl", "length", "copied", "similarity_first", "similarity_last"),
    *("read", "written", "usd", "seconds", "processor_seconds"),
)


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        name: title of the row.
        options: options of its runs, in addition to the recipe's.
        solutions: options of `omniopd solutions`, which then runs before the training; `None` to skip it.
    """

    name: str
    options: Mapping[str, Any]
    solutions: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Plan:
    """A grid of settings and seeds.

    Attributes:
        recipe: options of all runs.
        seeds: seeds of each row.
        rows: rows of the table; the others are compared with the first.
    """

    recipe: Mapping[str, Any]
    seeds: Sequence[int]
    rows: Sequence[Row]


@dataclass(frozen=True)
class Job:
    """One run of the grid."""

    row: int
    seed: int
    folder: Path
    recipe: Mapping[str, Any]
    solutions: Mapping[str, Any] | None = None

    @property
    def is_finished(self) -> bool:
        return (self.folder / FINISHED).exists()


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


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser of `omniopd`."""
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
    parser.set_defaults(call=ablate)


def ablate(options: argparse.Namespace) -> None:
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
    grids = [jobs_of(plan, file.parent) for plan, file in zip(plans, files, strict=True)]
    jobs = distinct(grids)
    devices = _devices()
    number = options.jobs or len(devices) or os.cpu_count() or 1
    env = _common_env(jobs)
    apply_env({"env": env or {}})  # inherited by the process that runs are forked from
    tables = [*zip(plans, grids, files, strict=True)]
    try:
        failed = run_all([job for job in jobs if not job.is_finished], number, devices, env, partial(_update, tables))
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt("The same command continues.") from error
    for plan, grid, file in tables:
        if table := _write_table(plan, grid, file):
            sys.stdout.write(f"\n{markdown(table)}\n\nWrote {file}.json and {file}.md.\n")
            _draw(table, file)
    if failed:
        names = ", ".join(str(job.folder) for job in failed)
        raise DataError(f"{len(failed)} of {len(jobs)} runs failed: {names}. Read {LOG} in each, and start again.")


def distinct(grids: Sequence[Sequence[Job]]) -> list[Job]:
    """The runs of several plans, those that plans share once.

    Raises:
        ConfigError: when two plans would train runs with different settings in one folder.
    """
    jobs: dict[Path, Job] = {}
    for job in (job for grid in grids for job in grid):
        other = jobs.setdefault(job.folder, job)
        sides = [{**side.recipe, "solutions": side.solutions} for side in (other, job)]
        _check_same(job.folder, *sides)
    return list(jobs.values())


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
                _say(f"{file}.md: {error}")


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
        _write(file.with_name(f"{file.name}{suffix}"), f"{text}\n")
    return table


def read_plan(path: str, *, seeds: Sequence[int] | None = None, names: Sequence[str] | None = None) -> Plan:
    """Read a plan, and refuse unknown options of its rows before anything runs.

    Args:
        path: path of the YAML file.
        seeds: seeds, instead of those of the plan.
        names: names of the rows to keep, besides the first; `None` keeps all.

    Raises:
        ConfigError: when the plan, or the recipe that it names, cannot be used.
    """
    import yaml

    try:
        plan = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"The plan {path!r} cannot be read: {error}") from error
    if not isinstance(plan, dict) or not isinstance(plan.get("rows"), list) or not plan["rows"]:
        raise ConfigError(f"The plan {path!r} needs `rows`, a list of settings with a `name` and `options`.")
    check_names(map(str, plan), _PLAN_KEYS, path)
    for row in plan["rows"]:
        if not isinstance(row, dict) or not isinstance(row.get("name"), str):
            raise ConfigError(f"A row of the plan {path!r} is {row!r}; it needs a `name`.")
        check_names(map(str, row), _ROW_KEYS, f"the row {row['name']!r} of {path}")
    rows = [
        Row(row["name"], _mapping(row, "options", path) or {}, _mapping(row, "solutions", path))
        for row in plan["rows"]
    ]
    titles = [row.name for row in rows]
    if len({_slug(title) for title in titles}) < len(rows):
        raise ConfigError(f"Two rows of the plan {path!r} have the same name. Their runs would share a folder.")
    if unknown := set(names or ()) - set(titles):
        raise ConfigError(f"The plan {path!r} has no row {sorted(unknown)[0]!r}; it has {', '.join(titles)}.")
    rows = [row for k, row in enumerate(rows) if names is None or k == 0 or row.name in names]
    found = seeds or plan.get("seeds", [0])
    if not isinstance(found, list) or not all(isinstance(seed, int) for seed in found) or not found:
        raise ConfigError(f"`seeds` is {found!r} in {path}; it must be a list of whole numbers.")
    if not isinstance(name := plan.get("config"), str):
        raise ConfigError(f"`config` is {name!r} in {path}; it must be the name or the path of a recipe.")
    recipe_path = recipe_files().get(name) or Path(path).parent / name
    hints = option_hints()
    recipe = {**check_recipe(str(recipe_path), hints), **(_mapping(plan, "options", path) or {})}
    for row in rows:
        where = f"the row {row.name!r} of {path}"
        options = {**recipe, **row.options}
        check_options(options, hints, where)
        check_method_name(options.get("method") or "omniopd")
        for section in SECTIONS:
            parse_section(section, options.get(section))
        check_names(map(str, row.solutions or ()), [*_SOLUTIONS_KEYS, *hints], f"`solutions` of {where}")
    return Plan(recipe, list(dict.fromkeys(found)), rows)


def _mapping(values: Mapping[str, Any], key: str, path: str) -> Mapping[str, Any] | None:
    value = values.get(key)
    if not isinstance(value, dict | None):
        raise ConfigError(f"`{key}` is {value!r} in {path}; it must be a mapping of options to values.")
    return value


def jobs_of(plan: Plan, folder: Path) -> list[Job]:
    """The runs of a plan, seed by seed.

    Raises:
        ConfigError: when one would measure nothing, or its folder holds a run with other settings.
    """
    jobs = []
    for seed in plan.seeds:
        for number, row in enumerate(plan.rows):
            place = folder / _slug(row.name) / f"seed-{seed}"
            recipe = {
                **plan.recipe,
                **row.options,
                "seed": seed,
                "output_dir": str(place),
                # The table needs the score of each problem.
                "log_completions": True,
                "num_completions_to_print": 1,
            }
            _check_evaluated(row.name, recipe)
            _check_unchanged(place, recipe, row.solutions)
            jobs.append(Job(number, seed, place, recipe, row.solutions))
    return jobs


def _check_evaluated(name: str, recipe: Mapping[str, Any]) -> None:
    evaluates = any(recipe.get(option) for option in ("do_eval", "eval_on_start", "evaluate_teacher"))
    if not evaluates and recipe.get("eval_strategy", False) in (False, "no"):
        raise ConfigError(
            f"The row {name!r} has no `eval_strategy`, so its runs would not be evaluated. Set it, for example to "
            "`steps` with `eval_steps`, in the plan's `options`."
        )
    if recipe.get("save_audits", True) is False:
        raise ConfigError(
            f"The row {name!r} has `save_audits: false`, and the table is read from the journals. Leave it out."
        )
    if isinstance(functions := recipe.get("reward_funcs"), list) and len(functions) > 1:
        raise ConfigError(
            f"The row {name!r} has {len(functions)} `reward_funcs`, and the table compares one pass@1. Name one."
        )


def _check_unchanged(folder: Path, recipe: Mapping[str, Any], solutions: Mapping[str, Any] | None) -> None:
    import yaml

    for name, now in ((RECIPE, recipe), (SOLUTIONS, {"solutions": solutions})):
        if (folder / name).exists():  # runs of earlier versions have no second file
            _check_same(folder, yaml.safe_load((folder / name).read_text(encoding="utf-8")), now)


def _check_same(folder: Path, before: Mapping[str, Any], recipe: Mapping[str, Any]) -> None:
    changed = sorted(key for key in {*before, *recipe} if before.get(key) != recipe.get(key))
    if changed:
        key = changed[0]
        raise ConfigError(
            f"{folder} holds a run with other settings: `{key}` was {before.get(key)!r} and is {recipe.get(key)!r}. "
            "Name another folder with --output_dir, or remove this one."
        )


def run_all(
    jobs: Sequence[Job], number: int, devices: Sequence[str], env: Any, ended: Callable[[Job], None]
) -> list[Job]:
    """Run the jobs, `number` at a time, and return those that failed.

    Args:
        jobs: runs that are not finished.
        number: runs at a time.
        devices: GPUs; each run gets one of them.
        env: the environment variables of this process that recipes set.
        ended: called after each run.

    Raises:
        KeyboardInterrupt: after Control-C, when the runs have ended as `omniopd train` does. No other is started.
    """
    methods = multiprocessing.get_all_start_methods()
    forks = "forkserver" if "forkserver" in methods else "spawn"
    multiprocessing.get_context(forks).set_forkserver_preload([*_IMPORTED])
    free = deque(devices[slot % len(devices)] if devices else None for slot in range(number))
    waiting = deque(jobs)
    running: list[_Run] = []
    # Control-C is blocked except in `_wait`, where each process that was started is known. A new process starts with
    # the signal blocked, and unblocks it when it can handle it.
    if forks == "forkserver":
        resource_tracker.ensure_running()  # unblocks the signal when it starts
    _mask_control_c(True)
    try:
        while waiting or running:
            while waiting and free:
                job, device = waiting.popleft(), free.popleft()
                # CUDA allows no fork, and libraries read their variables when they are imported.
                fresh = device is not None or job.recipe.get("env") != env
                _say(f"{job.folder}: started")
                running.append(_Run(job, device, "spawn" if fresh else forks))
            _wait(running)
            for run in [run for run in running if run.has_ended()]:
                running.remove(run)
                free.append(run.device)
                _say(f"{run.job.folder}: {'done' if run.job.is_finished else 'FAILED'} after {run.seconds:.0f} s")
                ended(run.job)
    except BaseException:
        for run in running:
            run.interrupt()
        _wait(running, all)
        raise
    finally:
        for run in running:  # after a second Control-C
            run.process.kill()
        _mask_control_c(False)
    return [job for job in jobs if not job.is_finished]


def _mask_control_c(blocked: bool) -> None:
    if os.name == "posix":
        signal.pthread_sigmask(signal.SIG_BLOCK if blocked else signal.SIG_UNBLOCK, {signal.SIGINT})


def _wait(running: "Sequence[_Run]", enough: Callable[[Sequence[bool]], bool] = any) -> None:
    """Wait until the process of any run, or of all, has ended. Control-C interrupts it."""
    _mask_control_c(False)
    while not enough([run.process.exitcode is not None for run in running]):
        # A process may have ended since. Without any, `connection.wait` would wait forever.
        if sentinels := [run.process.sentinel for run in running if run.process.exitcode is None]:
            connection.wait(sentinels)
    _mask_control_c(True)


class _Run:
    """A job in processes of its own, one after the other, with their output in a file.

    A run that was interrupted is resumed: it replays its journal, and pays nothing twice.

    Args:
        job: the run.
        device: its GPU; `None` without one.
        start_method: start method of `multiprocessing`.
    """

    def __init__(self, job: Job, device: str | None, start_method: str):
        import yaml

        self.job, self.device, self.start_method = job, device, start_method
        path = job.folder / RECIPE
        # `omniopd train` refuses to resume where there is nothing yet.
        resumes = journals_of(job.folder) or any(job.folder.glob("checkpoint-*/trainer_state.json"))
        job.folder.mkdir(parents=True, exist_ok=True)
        _write(path, yaml.safe_dump(dict(job.recipe), sort_keys=False))
        self.commands = [["train", "--config", str(path), *(["--resume_from_checkpoint", "true"] if resumes else [])]]
        if job.solutions is not None:
            _write(job.folder / SOLUTIONS, yaml.safe_dump({"solutions": dict(job.solutions)}))
            self.commands.insert(0, ["solutions", "--config", str(path), *words_of(job.solutions)])
        self.began = time.perf_counter()
        self.processor_seconds = 0.0
        self._start()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.began

    def _start(self) -> None:
        context: Any = multiprocessing.get_context(self.start_method)
        self.used, used = context.Pipe(duplex=False)
        arguments = (self.commands.pop(0), str(self.job.folder / LOG), self.device, used)
        self.process = context.Process(target=_run_command, args=arguments)
        self.process.start()
        used.close()

    def has_ended(self) -> bool:
        """Whether the last command has ended, or one has failed. Starts the next one if there is one."""
        code = self.process.exitcode
        if code == 0:
            self.processor_seconds += self.used.recv()
            if self.commands:
                self._start()
                return False
            result = {"seconds": self.seconds, "processor_seconds": self.processor_seconds}
            _write(self.job.folder / FINISHED, json.dumps(result) + "\n")
        return code is not None

    def interrupt(self) -> None:
        """Send Control-C. From a terminal, the process has it already, and treats both as one."""
        if self.process.exitcode is None:
            os.kill(self.process.pid, signal.SIGINT)


def _run_command(command: Sequence[str], log: str, device: str | None, used: connection.Connection) -> None:
    """Run `omniopd train` or another command in this process, which is one of its own, with its output in a file.

    Args:
        command: the words after `omniopd`.
        log: path of the file.
        device: the GPU to use; `None` without one.
        used: gets the seconds of a processor that this process and its children took.
    """
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    for stream, target in ((os.open(os.devnull, os.O_RDONLY), 0), (file, 1), (file, 2)):
        os.dup2(stream, target)
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    threading.Thread(target=_end_with_parent, daemon=True).start()
    ControlC().install()
    try:
        _mask_control_c(False)
        if command[0] == "train":
            from omniopd_trl.cli.train import run

            code = run(command[1:])
        else:
            from omniopd_trl.cli.main import main

            code = main(command)
    except KeyboardInterrupt:  # before the command has begun
        code = 128 + signal.SIGINT
    used.send(sum(os.times()[:4]))
    sys.exit(code)


def _end_with_parent() -> None:
    """End this process when the command that started it was killed: a run alone would continue to pay the teacher."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


def _write(path: Path, text: str) -> None:
    """Write a file, all or nothing: the command may be killed."""
    new = path.with_suffix(".new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def words_of(options: Mapping[str, Any]) -> list[str]:
    """Options as words of a command. A switch is its name alone, and is left out when it is false.

    Example:
        >>> words_of({"num_prompts": 64, "verified": True, "dry_run": False})
        ['--num_prompts', '64', '--verified']
    """
    words: list[str] = []
    for name, value in options.items():
        words += [] if value is False else [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words


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
        rows have. It does not contain the spread of the seeds, which is `after_std`.
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
        row["difference"] = None if number == 0 or 0 not in results else _difference(runs, results[0])
        rows.append(row)
    return {"versions": package_versions(), "recipe": dict(plan.recipe), "rows": rows}


def _difference(runs: Mapping[int, Result], first: Mapping[int, Result]) -> dict[str, Any] | None:
    from omniopd_trl.evals.statistics import paired_test

    seeds = sorted(runs.keys() & first.keys())
    if not seeds:
        return None
    prompts = sorted(set.intersection(*(set(side[seed].problems) for side in (runs, first) for seed in seeds)))
    if not prompts:
        return None
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
    return "\n".join(lines)


def change_of_similarity(row: Mapping[str, Any]) -> str:
    """The mean similarity in the first and in the last quarter of a row's steps; empty without rollouts."""
    first, last = row.get("similarity_first"), row.get("similarity_last")
    return "" if first is None else f"{first:.2f} to {last:.2f}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _draw(table: Mapping[str, Any], path: Path) -> None:
    """Write the figure to files with this path and their own suffixes, if matplotlib is installed."""
    from omniopd_trl.report.figures import bars

    rows = table["rows"]
    lines = [(row["name"], row["after"], row["after_std"] or 0.0, row["after_by_seed"]) for row in rows]
    before = [row["before"] for row in rows if row["before"] is not None]
    try:
        paths = bars(lines, "pass@1", path, baseline=statistics.fmean(before) if before else None)
    except OmniOPDError as error:
        sys.stdout.write(f"No figure: {error}\n")
    else:
        sys.stdout.write(f"Wrote {' and '.join(map(str, paths))}.\n")


def _devices() -> list[str]:
    """The GPUs that runs may use, by index; empty without one."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [device for device in visible.split(",") if device.strip() and not device.strip().startswith("-")]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "row"
