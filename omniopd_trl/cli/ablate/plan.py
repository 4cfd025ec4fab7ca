# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Plans of `omniopd ablate`: their rows, and the runs that they stand for."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from omniopd_trl.cli.hints import SECTIONS, option_hints
from omniopd_trl.cli.options import (
    check_method_name,
    check_names,
    check_options,
    check_recipe,
    load_yaml,
    parse_section,
)
from omniopd_trl.cli.recipes import recipe_files
from omniopd_trl.errors import ConfigError

# Files in the folder of a run. The first is written when it has ended well; the last has options of `omniopd
# solutions`, for a run that collects them.
FINISHED, RECIPE, LOG, SOLUTIONS = "finished.json", "recipe.yaml", "log.txt", "solutions.yaml"

_PLAN_KEYS = ("config", "seeds", "options", "rows")
_ROW_KEYS = ("name", "options", "solutions")
_SOLUTIONS_KEYS = ("num_solutions", "batch", "verified", "num_prompts")


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


def read_plan(path: str, *, seeds: Sequence[int] | None = None, names: Sequence[str] | None = None) -> Plan:
    """Read a plan, and refuse unknown options of its rows before anything runs.

    Args:
        path: path of the YAML file.
        seeds: seeds, instead of those of the plan.
        names: names of the rows to keep, besides the first; `None` keeps all.

    Raises:
        ConfigError: when the plan, or the recipe that it names, cannot be used.
    """
    plan = load_yaml(path, "plan", "Check the path; recipes/plans has examples.")
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
    recipe = {**check_recipe(str(recipe_path)), **(_mapping(plan, "options", path) or {})}
    for row in rows:
        where = f"the row {row.name!r} of {path}"
        options = {**recipe, **row.options}
        check_options(options, where)
        check_method_name(options.get("method") or "omniopd")
        for section in SECTIONS:
            parse_section(section, options.get(section))
        check_names(map(str, row.solutions or ()), [*_SOLUTIONS_KEYS, *option_hints()], f"`solutions` of {where}")
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


def distinct(grids: Sequence[Sequence[Job]]) -> list[Job]:
    """The runs of several plans, those that plans share once.

    Raises:
        ConfigError: when two plans would train runs with different settings in one folder.
    """
    jobs: dict[Path, Job] = {}
    for job in chain(*grids):
        other = jobs.setdefault(job.folder, job)
        sides = [{**side.recipe, "solutions": side.solutions} for side in (other, job)]
        _check_same(job.folder, *sides)
    return list(jobs.values())


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "row"
