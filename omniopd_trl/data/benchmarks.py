# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Load named training and evaluation sets, local files of problems, and procedural problems.

The table of the sets is in [`sets`].
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import yaml
from datasets import Dataset, DatasetDict, Features, List, Value, concatenate_datasets
from datasets.fingerprint import Hasher

from omniopd_trl.data.checks import check_dataset
from omniopd_trl.data.datasets import get_split, load_dataset_or_files, only_split
from omniopd_trl.data.prompts import QUESTION_COLUMNS, prepare_prompts, resolve_template
from omniopd_trl.data.sets import BENCHMARKS, STDIN, Benchmark, Row
from omniopd_trl.errors import ConfigError, DataError, did_you_mean, first_line, import_extra

BENCHMARK = "benchmark:"
GYM = "reasoning_gym:"

# Part of the fingerprint of what is loaded. Raise it when the same rows become other prompts, answers or tests:
# `datasets` would reuse what an earlier version cached.
_VERSION = 1
# Draws the sets of 100 problems. The paper does not state its seed.
_SEED = 0

# A task of `reasoning_gym` draws problem `i` with the seed `seed + i`: with neighbouring seeds, two splits would hold
# the same problems.
_GYM_TEST_SEED = 10**9

# Separates sets. A comma in brackets is part of an option: `operators=["+","-"]`.
_COMMA = re.compile(r",(?![^\[]*\])")

_FEATURES = {
    "prompt": List({"role": Value("string"), "content": Value("string")}),
    "question": Value("string"),
    "id": Value("string"),
    "source": Value("string"),
}

CODE_TEMPLATE = (
    "Solve the following programming problem in Python. {task} Put the whole program into one block that starts with "
    "```python.\n\n{question}"
)
GYM_TEMPLATE = (
    "{question}\n\nThe last line of your response should be of the form Answer: $Answer (without quotes) where "
    "$Answer is the answer to the problem."
)


def load_benchmark(name: str, split: str | None = None, limit: int | None = None) -> Dataset:
    """Load a training or evaluation set with prompts.

    Args:
        name: one of

            - the name of a set in `BENCHMARKS`, which is loaded from the Hub or its cache: `"math_500"`;
            - a set and a local file or folder with the columns that it has on the Hub: `"math_500@data/MATH-500"`;
            - `"reasoning_gym:TASK"`, procedural problems of the package of that name, with options of the task:
              `"reasoning_gym:chain_sum?min_terms=2&max_terms=3&size=500&seed=7"`;
            - a local file or folder with `prompt`, `question` or `problem`, and `answer`, `solution` or `tests`.

            The prefix `benchmark:` of a recipe is accepted.
        split: the split. Defaults to that of the table; for local files to `"test"` if there is one, or else the only
            split; for `reasoning_gym` to `"test"`.
        limit: maximum number of problems, the first ones. `None` for all.

    Returns:
        A dataset with `prompt` (one user message), `question` (its text without the instructions), `id`, `source` (the
        name of the set), and `answer`, or for code `tests`: JSON text that [`~omniopd_trl.evals.code.code_accuracy`]
        reads. A local file of your own keeps its columns and gets `id` and `source` if it has none.

    Raises:
        ConfigError: when there is no such set or task.
        DataError: when the set cannot be loaded, or a column is missing or cannot be read; the message names both.
        MissingExtraError: when `reasoning_gym` is not installed.
    """
    name = name.removeprefix(BENCHMARK)
    if limit is not None and limit < 1:
        raise ConfigError(f"limit={limit}: the number of problems must be at least 1. Leave it out for all.")
    if name.startswith(GYM):
        return _gym_problems(name, split or "test", limit)
    known, at, path = name.partition("@")
    if known in BENCHMARKS:
        if at and not path:
            raise ConfigError(f"{name!r} names no path. Add the copy of the set after the @, or leave out the @.")
        return _load(known, BENCHMARKS[known], split, limit, path)
    if "/" not in known and "." not in known and not (at and Path(name).exists()):
        raise ConfigError(
            f"There is no set {known!r}. {did_you_mean(known, BENCHMARKS)} A local file of your own is named with its "
            "ending (`problems.jsonl`), a folder with a slash (`./problems`)."
        )
    return _load_files(name, split, limit)


def load_benchmark_splits(name: str) -> DatasetDict:
    """Load the sets that a recipe names: `benchmark:TRAINING,EVALUATION,...` or `reasoning_gym:TASK`.

    Args:
        name: sets as in [`load_benchmark`], separated by commas.

    Returns:
        Sets to train on as the split `"train"`, and sets to evaluate on as the split `"test"`, each joined to one.
        A `reasoning_gym` task gives both, and a local file of your own is a set to evaluate on.

    Raises:
        ConfigError: when there is no such set or task.
        DataError: when a set cannot be loaded, or two that are joined have different columns.
    """
    parts: dict[str, list[Dataset]] = {}
    for part in map(str.strip, _COMMA.split(name.removeprefix(BENCHMARK))):
        known = part.partition("@")[0].removeprefix(BENCHMARK)
        if part.startswith(GYM):
            loaded = {split: load_benchmark(part, split) for split in ("train", "test")}
        elif known in BENCHMARKS:
            split = "train" if BENCHMARKS[known].purpose == "training" else "test"
            loaded = {split: load_benchmark(part)}
        else:
            loaded = {"test": load_benchmark(part)}
        for split, dataset in loaded.items():
            parts.setdefault(split, []).append(dataset)
    for split, datasets in parts.items():
        if len(datasets) > 1:  # the sets number their problems alike
            datasets[:] = [one.map(_with_source, desc="ids") for one in datasets]
        columns = {tuple(sorted(dataset.column_names)) for dataset in datasets}
        if len(columns) > 1:
            raise DataError(
                f"The sets of {name!r} for the split {split!r} have different columns "
                f"({' and '.join(map(str, sorted(columns)))}), and cannot be joined. Name sets of one kind, such as "
                "problems with an answer or problems with tests."
            )
    return DatasetDict({split: concatenate_datasets(datasets) for split, datasets in parts.items()})


def questions_of(name: str, split: str | None, default: str) -> list[str]:
    """The text of each problem of a set, without instructions that we add.

    Args:
        name: a set as in [`load_benchmark`], or an id on the Hub.
        split: the split; `None` for the set's own.
        default: split of a file, a folder or an id, if it has several.

    Raises:
        ConfigError, DataError: when it cannot be loaded, or holds no problems.
    """
    name = name.removeprefix(BENCHMARK)
    if name.startswith(GYM):
        return list(load_benchmark(name, split or default)["question"])
    if name.partition("@")[0] in BENCHMARKS:
        return list(load_benchmark(name, split)["question"])
    splits = load_dataset_or_files(name)
    dataset = prepare_prompts(get_split(splits, split or only_split(splits, default), "split"))
    check_dataset(dataset, name)
    column = next(column for column in (*QUESTION_COLUMNS, "prompt") if column in dataset.column_names)
    return [
        problem
        if isinstance(problem, str)
        else "\n".join(str(message["content"]) for message in problem if message["role"] == "user")
        for problem in dataset[column]
    ]


def _load(name: str, benchmark: Benchmark, split: str | None, limit: int | None, path: str) -> Dataset:
    if path:
        # A copy of the whole repository has a folder for each configuration.
        folder = benchmark.folder or benchmark.config
        inner = [str(found) for found in Path(path).expanduser().rglob(folder) if found.is_dir()] if folder else []
        splits = load_dataset_or_files(min(inner, default=path))
        split = split or only_split(splits, benchmark.split)
    else:
        try:
            splits = load_dataset_or_files(
                benchmark.source, benchmark.config, revision=benchmark.revision, data_dir=benchmark.folder
            )
        except DataError as error:
            raise DataError(f"{error} A copy with the same columns is named with its path: '{name}@PATH'.") from error
    dataset = get_split(splits, split or benchmark.split, "split")
    for column in benchmark.columns:
        if column not in dataset.column_names:
            raise DataError(
                f"The set {name!r} has no column {column!r} (it has: {', '.join(dataset.column_names)}). Its columns "
                f"are those of {benchmark.source} on the Hub: {', '.join(benchmark.columns)}."
            )
    dataset = _select(name, benchmark, dataset, limit)
    if len(dataset) == 0:
        raise DataError(
            f"The set {name!r} has no problems left. Left out are: {benchmark.left_out or 'none'}. Check the split."
        )
    return dataset.map(
        partial(_problem, name=name, benchmark=benchmark),
        with_indices=True,
        remove_columns=dataset.column_names,
        features=Features({**_FEATURES, "tests" if benchmark.scorer == "code" else "answer": Value("string")}),
        new_fingerprint=Hasher.hash(["benchmark", _VERSION, name, dataset._fingerprint]),
    )


def _with_source(row: Row) -> Row:
    return {"id": f"{row['source']}/{row['id']}"}


def _select(name: str, benchmark: Benchmark, dataset: Dataset, limit: int | None) -> Dataset:
    """The rows that belong to the set. Only the columns that decide are read."""
    if benchmark.keep:
        kept = []
        for i, values in enumerate(zip(*(dataset[column] for column in benchmark.keep), strict=True)):
            with _row_errors(name, benchmark, i):
                if benchmark.keeps(*values):
                    kept.append(i)
        dataset = dataset.select(kept)
    if benchmark.unique is not None:
        column, key = benchmark.unique.split(".")
        numbers: dict[Any, int] = {}
        for i, value in enumerate(dataset[column]):
            with _row_errors(name, benchmark, i):
                if value[key] is None:
                    raise ValueError(f"there is no {benchmark.unique}")
                numbers.setdefault(value[key], i)
        dataset = dataset.select(list(numbers.values()))
    if benchmark.sample is not None and len(dataset) > benchmark.sample:
        dataset = dataset.shuffle(seed=_SEED).select(range(benchmark.sample))
    return dataset if limit is None else dataset.select(range(min(limit, len(dataset))))


@contextmanager
def _row_errors(name: str, benchmark: Benchmark, index: int) -> Iterator[None]:
    """Reports a row whose cells are not those of the set."""
    try:
        yield
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise DataError(
            f"Row {index} of the set {name!r} cannot be read ({type(error).__name__}: {first_line(error)}). Its "
            f"columns {', '.join(benchmark.columns)} must be those of {benchmark.source} on the Hub."
        ) from error


def _problem(row: Row, index: int, name: str, benchmark: Benchmark) -> Row:
    """A row of the set in our columns."""
    with _row_errors(name, benchmark, index):
        problem = benchmark.read(row)
        for column in problem:
            if problem[column] in (None, ""):
                raise ValueError(f"there is no {column}")
    if "prompt" not in problem:
        template = CODE_TEMPLATE if benchmark.scorer == "code" else resolve_template("math")
        text = template.replace("{task}", problem.pop("task", STDIN)).replace("{question}", problem["question"])
        problem["prompt"] = [{"role": "user", "content": text}]
    return problem | {"id": str(index if benchmark.id is None else row[benchmark.id]), "source": name}


def _load_files(name: str, split: str | None, limit: int | None) -> Dataset:
    splits = load_dataset_or_files(name)
    dataset = get_split(splits, split or only_split(splits, "test"), "split")
    if limit is not None:
        dataset = dataset.select(range(min(limit, len(dataset))))
    questions = [column for column in ("prompt", *QUESTION_COLUMNS) if column in dataset.column_names]
    if not questions:
        raise DataError(
            f"{name!r} has no column 'prompt', 'question' or 'problem' (it has: {', '.join(dataset.column_names)}). "
            "Rename the column that holds the problem."
        )
    if not {"answer", "solution", "tests"} & {*dataset.column_names}:
        raise DataError(
            f"{name!r} has no column 'answer', 'solution' or 'tests' (it has: {', '.join(dataset.column_names)}), and "
            "nothing can be scored without. Rename the column that holds the right answer."
        )
    is_code = "tests" in dataset.column_names
    template = CODE_TEMPLATE.replace("{task}", STDIN) if is_code else "math"
    dataset = prepare_prompts(dataset, None if questions[0] == "prompt" else template)
    if "id" not in dataset.column_names:
        dataset = dataset.add_column("id", [str(i) for i in range(len(dataset))])
    if "source" not in dataset.column_names:
        dataset = dataset.add_column("source", [name] * len(dataset))
    return dataset


# Procedural problems


def gym_task(name: str) -> tuple[str, dict[str, Any]]:
    """The task and the options of `reasoning_gym:TASK?option=value&...`. Values are read as YAML.

    Raises:
        ConfigError: when an option has no value, or more than one.
    """
    task, _, query = name.removeprefix(GYM).partition("?")
    options: dict[str, Any] = {}
    try:
        # A + is an operator here, and no space.
        for key, value in parse_qsl(query.replace("+", "%2B"), True, strict_parsing=True) if query else ():
            if not value or key in options:
                raise ValueError(f"{key!r} has {'two values' if value else 'no value'}")
            options[key] = yaml.safe_load(value)
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(
            f"{name!r} cannot be read ({first_line(error)}). Options of a task are "
            f"`{GYM}TASK?option=value&option=value`."
        ) from error
    return task, options


def make_gym_dataset(task: str, options: Mapping[str, Any]) -> Any:
    """The procedural dataset of a task. The same options give the same problems.

    Args:
        task: name of the task in `reasoning_gym`, such as `"chain_sum"`.
        options: its options, with `size` and `seed`.

    Raises:
        ConfigError: when there is no such task, or an option is not one of it.
        MissingExtraError: when `reasoning_gym` is not installed.
    """
    gym = import_extra("reasoning_gym", "gym")
    if task not in gym.factory.DATASETS:
        raise ConfigError(f"reasoning_gym has no task {task!r}. {did_you_mean(task, gym.factory.DATASETS)}")
    try:
        dataset = gym.create_dataset(task, **options)
        dataset[0]  # some options are checked when a problem is drawn
        return dataset
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(
            f"reasoning_gym cannot create {task!r} with {dict(options)} ({first_line(error)}). See the options of the "
            "task in its documentation."
        ) from error


def _gym_problems(name: str, split: str, limit: int | None) -> Dataset:
    """Different problems of a split. No problem of the test split is in the training split."""
    task, options = gym_task(name)
    if split not in ("train", "test"):
        raise ConfigError(f"{name!r} has the splits 'train' and 'test', not {split!r}.")
    size, seed = options.pop("size", None), options.pop("seed", None) or 0
    for option, value in (("size", size), ("seed", seed)):
        if value is not None and type(value) is not int:
            raise ConfigError(f"{name!r}: {option}={value!r} must be a whole number.")
    settings = {
        "train": options | {"size": 2000 if size is None else size, "seed": seed},
        "test": options | {"size": 200 if size is None else size, "seed": seed + _GYM_TEST_SEED},
    }
    problems = make_gym_dataset(task, settings[split])
    seen: set[str] = set()
    if split == "train":
        seen = {problem["question"] for problem in make_gym_dataset(task, settings["test"])}
    rows = []
    for index, problem in enumerate(problems):
        if problem["question"] in seen:
            continue
        text = GYM_TEMPLATE.replace("{question}", problem["question"])
        rows.append(
            {
                "prompt": [{"role": "user", "content": text}],
                "question": problem["question"],
                # A few tasks have many right answers, and name none.
                "answer": None if problem["answer"] is None else str(problem["answer"]),
                "gym": json.dumps({"task": task, "options": settings[split], "index": index}),
                "id": f"{split}-{index}",
                "source": name,
            }
        )
        seen.add(problem["question"])
        if limit is not None and len(rows) == limit:
            break
    return Dataset.from_list(rows)
