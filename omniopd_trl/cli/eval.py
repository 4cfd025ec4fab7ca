# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""`omniopd eval`: pass@1 of a model or a teacher on a set of problems, and the comparison of two results."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from omniopd_trl.cli.opening import open_recipe
from omniopd_trl.cli.options import positive_int, settings_of
from omniopd_trl.errors import ConfigError

if TYPE_CHECKING:
    from datasets import Dataset
    from trl import DatasetMixtureConfig

    from omniopd_trl.cli.recipe import OmniOPDScriptArguments

# Options of TRL for vLLM and the arguments of its engine. Their defaults leave room for training, so only those that
# are set are passed.
_VLLM = {
    "vllm_gpu_memory_utilization": "gpu_memory_utilization",
    "vllm_max_model_length": "max_model_len",
    "vllm_tensor_parallel_size": "tensor_parallel_size",
}

# Options that say what to evaluate. None has a default.
_OF_AN_EVALUATION = ("model", "dataset", "split", "limit", "config", "output_dir", "max_batch_tokens")


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser of `omniopd`."""
    parser = commands.add_parser(
        "eval",
        help="measure pass@1 of a model or a teacher, or compare two results",
        description="Sample answers to a set of problems and score them: pass@1 with a confidence interval, pass@k, "
        "majority, truncation and length. The same command continues an evaluation that was interrupted.",
        epilog="Any option of the training command may be added and overrides the recipe: --temperature 0.6, "
        "--max_completion_length 8192 (default without a recipe: 4096), --prompt_template math, --reward_funcs "
        "my_package.rewards.code, --teacher_budget_usd 5.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--model",
        metavar="MODEL",
        help="path or id of a model, or a teacher: anthropic:MODEL. Defaults to the recipe's student",
    )
    parser.add_argument(
        "--dataset",
        metavar="DATA",
        help="a named set, or id, file or folder of the problems, with `prompt`, `question` or `problem`, and "
        "`answer`, `solution` or `tests`. Defaults to the recipe's dataset",
    )
    parser.add_argument(
        "--split", metavar="SPLIT", help="split of the dataset (default: that of the recipe, `test`, or the only one)"
    )
    parser.add_argument("--limit", type=positive_int, metavar="N", help="only the first N problems")
    parser.add_argument("--config", metavar="RECIPE", help="a recipe whose options are used")
    parser.add_argument("--output_dir", metavar="DIR", help="folder of the results")
    parser.add_argument(
        "--num_samples", type=positive_int, default=16, metavar="K", help="samples per problem (default: 16)"
    )
    parser.add_argument("--eval_seed", type=int, default=0, metavar="S", help="seed of the samples (default: 0)")
    parser.add_argument(
        "--engine",
        choices=("transformers", "vllm"),
        default="transformers",
        help="what generates for a model by path or id (default: transformers)",
    )
    parser.add_argument(
        "--max_batch_tokens",
        type=positive_int,
        metavar="T",
        help="samples in a batch times their length, "
        "for transformers (default: 16384). More is faster and needs more memory",
    )
    parser.add_argument(
        "--with_teacher_context",
        action="store_true",
        help="show the model what only the teacher of a run sees (teacher_context_column)",
    )
    parser.add_argument(
        "--lenient",
        action="store_true",
        help="count a calculation with the right value as right, as --eval_lenient_answers true",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--compare",
        nargs=2,
        metavar=("A", "B"),
        help="compare the results in two folders by a paired test, and evaluate nothing",
    )


def run(options: argparse.Namespace, rest: Sequence[str]) -> None:
    """Evaluate or compare, and print the result.

    Args:
        options: options of the command.
        rest: options of the training command.

    Raises:
        OmniOPDError: when the settings, the model or the dataset cannot be used.
    """
    if options.compare:
        given = [f"--{name}" for name in _OF_AN_EVALUATION if getattr(options, name) is not None]
        if unused := [*rest, *given]:
            raise ConfigError(f"--compare evaluates nothing, so {unused[0]} has no effect. Leave it out.")
        _compare(options.compare, options.json)
        return
    if options.output_dir is None:
        raise ConfigError("`omniopd eval` needs a folder for its results: add `--output_dir DIR`.")
    arguments = list(rest)
    for name, value in (
        ("config", options.config),
        ("model_name_or_path", options.model),
        ("dataset_name", options.dataset),
        ("dataset_test_split", options.split),
    ):
        arguments += [] if value is None else [f"--{name}", value]
    arguments, recipe = open_recipe(arguments, ("model_name_or_path", "dataset_name"))
    read = ("use_cpu", "dtype", "dataset_test_split", "max_completion_length", "temperature", *_VLLM)
    explicit = settings_of(arguments, recipe, read)
    is_greedy = _is_zero(explicit["temperature"])

    from omniopd_trl.cli.recipe import load_functions, parse_args

    # The parser must neither look for the GPU that a recipe is made for, nor compare the length of chunks with that of
    # a sample.
    unused = ["--use_cpu", "true", "--chunk_length", "1", "--min_chunk_length", "1"]
    unused += ["--temperature", "1"] if is_greedy else []  # a student in training cannot be greedy
    parsed = parse_args([*arguments, "--output_dir", options.output_dir, *unused], "omniopd eval")
    script_args, args, model_args, dataset_args = parsed
    if options.dataset is not None:
        dataset_args.datasets = []  # those of the recipe
    if model_args.model_name_or_path is None or not (script_args.dataset_name or dataset_args.datasets):
        missing = "--model" if model_args.model_name_or_path is None else "--dataset"
        raise ConfigError(f"`omniopd eval` needs {missing}, or a recipe that names it: add `--config RECIPE.yaml`.")
    if args.max_completion_length is None:
        raise ConfigError("max_completion_length is not set, and a sample needs a limit. Set it.")

    if args.repetition_penalty != 1.0:
        raise ConfigError(
            f"repetition_penalty={args.repetition_penalty:g} changes how the student samples, and `omniopd eval` does "
            "not apply it. Add `--repetition_penalty 1` to evaluate without it."
        )
    functions = load_functions(script_args.reward_funcs)

    from trl import get_quantization_config

    from omniopd_trl.evals.evaluate import EvalSettings, evaluate
    from omniopd_trl.evals.results import table_of
    from omniopd_trl.teachers.context import NO_CONTEXT
    from omniopd_trl.teachers.load import is_local
    from omniopd_trl.teachers.options import TeacherOptions

    teacher_options = replace(TeacherOptions.of(args), device="cpu" if _is_true(explicit["use_cpu"]) else None)
    if is_local(model_args.model_name_or_path):
        loading = {} if explicit["dtype"] is None else {"dtype": model_args.dtype}
        if options.engine == "vllm":
            loading |= {_VLLM[name]: getattr(args, name) for name in _VLLM if explicit[name] is not None}
        else:
            for name, value in (
                ("attn_implementation", model_args.attn_implementation),
                ("quantization_config", get_quantization_config(model_args)),
            ):
                loading |= {} if value is None else {name: value}
        teacher_options = replace(
            teacher_options,
            teacher_model_init_kwargs={**loading, **(args.model_init_kwargs or {})},
            teacher_model_revision=model_args.model_revision,
            teacher_chat_template_kwargs=None,
        )
    settings = EvalSettings(
        num_samples=options.num_samples,
        # TRL's default, which a recipe without the option trains with, cuts the answers of today's models.
        max_tokens=EvalSettings.max_tokens
        if options.config is None and explicit["max_completion_length"] is None
        else args.max_completion_length,
        temperature=0.0 if is_greedy else args.temperature,
        top_p=args.top_p,
        top_k=max(args.top_k, 0),  # -1 means no limit in vLLM
        min_p=args.min_p or 0.0,
        seed=options.eval_seed,
        # As in training, an option of math-verify where the recipe names no function.
        lenient=options.lenient or (args.eval_lenient_answers and functions is None),
        max_batch_tokens=options.max_batch_tokens,
    )
    split, trains_on_it = explicit["dataset_test_split"], options.dataset is None
    problems = load_problems(script_args, dataset_args, split, options.limit, is_training_data=trains_on_it)
    context = args.teacher_context if options.with_teacher_context else NO_CONTEXT
    if options.with_teacher_context and context.column is None:
        raise ConfigError(
            "--with_teacher_context needs the name of a column: add `--teacher_context_column NAME`, or a recipe that "
            "sets it."
        )
    result = evaluate(
        model_args.model_name_or_path,
        dataset=problems,
        output_dir=options.output_dir,
        engine=options.engine,
        options=teacher_options,
        settings=settings,
        reward_funcs=functions,
        context=context,
    )
    if options.json:
        sys.stdout.write(json.dumps({"metrics": result.metrics, "settings": result.settings}, indent=2) + "\n")
    else:
        sys.stdout.write(f"{table_of(result)}\nThe result and all samples are in {options.output_dir}.\n")


def _is_zero(value: Any) -> bool:
    try:
        return float(value) == 0
    except (TypeError, ValueError):  # not set, or refused by the parser
        return False


def _is_true(value: Any) -> bool:
    return str(value).lower() in ("true", "yes", "t", "y", "1")


def load_problems(
    script_args: "OmniOPDScriptArguments",
    dataset_args: "DatasetMixtureConfig",
    split: str | None = None,
    limit: int | None = None,
    *,
    is_training_data: bool = False,
) -> "Dataset":
    """The problems of the command line or of a recipe, with the prompts of the trainer's evaluation.

    Args:
        script_args: options of the dataset and its prompts.
        dataset_args: the recipe's mixture of datasets, if it has one.
        split: the split that was named; `None` for that of a set, `test`, or the only one.
        limit: number of problems, the first ones; `None` for all.
        is_training_data: whether a recipe trains on the dataset. Its training split then has to be named.

    Raises:
        ConfigError, DataError: when they cannot be loaded, or are those that a recipe trains on.
    """
    from datasets import Dataset

    from omniopd_trl.cli.recipe import load_splits
    from omniopd_trl.data.benchmarks import BENCHMARK, BENCHMARKS, GYM, load_benchmark
    from omniopd_trl.data.datasets import get_split, only_split
    from omniopd_trl.data.prompts import prepare_prompts, resolve_template

    name = script_args.dataset_name or ""
    template = None if script_args.prompt_template is None else resolve_template(script_args.prompt_template)
    known = name.removeprefix(BENCHMARK).partition("@")[0]
    is_set = known in BENCHMARKS or name.startswith((BENCHMARK, GYM))
    if is_set and "," not in name:
        if is_training_data and split is None and known in BENCHMARKS and BENCHMARKS[known].purpose == "training":
            raise _trained_on(name, BENCHMARKS[known].split)
        problems = load_benchmark(name, split=split, limit=limit)
        if template is not None and name.startswith(GYM):
            problems = problems.remove_columns("prompt")
    else:
        splits = load_splits(script_args, dataset_args)
        chosen = split or only_split(splits, "test")
        if is_training_data and split is None and chosen == script_args.dataset_train_split:
            raise _trained_on(name or "the mixture", chosen)
        problems = get_split(splits, chosen, "--split")
        if limit is not None:
            problems = problems.take(limit)
        if not isinstance(problems, Dataset):
            problems = Dataset.from_list(list(problems))
    return prepare_prompts(problems, template)


def _trained_on(name: str, split: str) -> ConfigError:
    return ConfigError(
        f"The recipe's dataset, {name}, has only the split {split!r}, which the recipe trains on. Name problems to "
        f"evaluate on with `--dataset`, or add `--split {split}` to evaluate on these."
    )


def _compare(folders: Sequence[str], is_json: bool) -> None:
    from omniopd_trl.evals.results import EvalResult, as_json, compare, table_of_comparison

    first, second = (EvalResult.load(folder) for folder in folders)
    comparison = compare(first, second)
    if is_json:
        sys.stdout.write(json.dumps(as_json(comparison), indent=2) + "\n")
    else:
        sys.stdout.write(table_of_comparison(comparison, (folders[0], folders[1])) + "\n")
