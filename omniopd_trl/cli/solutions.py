# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""`omniopd solutions`: collect complete solutions from the teacher of a recipe, for SFT."""

import argparse
import math
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omniopd_trl.cli.opening import check_models, open_recipe, with_recipe
from omniopd_trl.cli.options import positive_int
from omniopd_trl.cli.tables import say
from omniopd_trl.errors import ConfigError, DataError, MissingExtraError

if TYPE_CHECKING:
    from omniopd_trl.accounting.forecast import Load
    from omniopd_trl.trainer.omniopd_config import OmniOPDConfig


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser of `omniopd`."""
    parser = commands.add_parser(
        "solutions",
        help="collect complete solutions from the teacher of a recipe, for --method sft",
        description="Ask the teacher of a recipe for complete solutions of the training prompts, and write them to "
        "`solutions.jsonl` in the folder `solutions` of the run (the option `solutions` sets another). Answers are "
        "recorded as they arrive, and count against `teacher_budget_usd` and `teacher_budget_tokens`: a command that "
        "was stopped continues when it is started again, and pays for nothing twice.",
        epilog="Any option of the training command may be added and overrides the recipe: --teacher_temperature 0.7.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="RECIPE", help="the recipe, a YAML file")
    parser.add_argument(
        "-k", "--num_solutions", type=positive_int, default=1, metavar="K", help="solutions per prompt (default: 1)"
    )
    parser.add_argument(
        "--batch",
        action="store_true",
        help="send the requests in batches, which cost about half and are answered within a day: for openai:, "
        "anthropic: and gemini: teachers",
    )
    parser.add_argument(
        "--verified", action="store_true", help="keep only solutions that are right; otherwise they are marked"
    )
    parser.add_argument(
        "--num_prompts",
        type=positive_int,
        metavar="N",
        help="ask with the first N prompts, in the order of `seed`; a later command may ask with more (default: all)",
    )
    parser.add_argument(
        "--solution_length",
        type=positive_int,
        metavar="S",
        help="mean length of a solution in tokens, for the forecast (default: the most that a request asks for)",
    )
    parser.add_argument("--dry_run", action="store_true", help="print requests, tokens and dollars, and ask nothing")


def run(options: argparse.Namespace, rest: Sequence[str]) -> None:
    """Collect the solutions, after a forecast.

    Args:
        options: options of the command.
        rest: options of the training command.

    Raises:
        OmniOPDError: when the recipe, its dataset or its teacher cannot be used.
    """
    arguments, _ = open_recipe(with_recipe("solutions", options.config, rest))

    from omniopd_trl.cli.recipe import load_functions, parse_args

    script_args, args, model_args, dataset_args = parse_args(arguments, "omniopd solutions --config RECIPE.yaml")
    check_models(
        options.config,
        model_name_or_path=model_args.model_name_or_path,  # its tokenizer measures the prompts
        teacher_model_name_or_path=args.teacher_model_name_or_path,
    )
    if options.num_solutions > 1 and args.teacher_temperature == 0:
        raise ConfigError(
            f"-k {options.num_solutions} with teacher_temperature=0: all solutions of a prompt would be the same. Add "
            "--teacher_temperature 1, or leave out -k."
        )
    dataset, identity = _prompts(script_args, dataset_args, args.seed, options.num_prompts)
    args.teacher_context.check(dataset)
    functions = load_functions(script_args.reward_funcs)
    folder = script_args.solutions or os.path.join(args.output_dir, "solutions")
    load = _forecast(dataset, args, model_args, options)
    say(_describe(load, len(dataset), args, options, folder))
    if not options.dry_run:
        _collect(dataset, identity, functions, folder, args, options)


def _prompts(script_args: Any, dataset_args: Any, seed: int, num_prompts: int | None) -> tuple[Any, str]:
    """The training prompts in the order of the seed, and a name of the whole set."""
    from datasets import Dataset

    from omniopd_trl.cli.recipe import load_prompts

    dataset = load_prompts(script_args, dataset_args)
    if not isinstance(dataset, Dataset):
        raise DataError(
            "dataset_streaming=True: solutions are collected for a dataset that can be counted. Set it to false."
        )
    identity = dataset._fingerprint
    dataset = dataset.shuffle(seed=seed)
    return dataset.select(range(min(num_prompts or len(dataset), len(dataset)))), identity


def _forecast(dataset: Any, args: "OmniOPDConfig", model_args: Any, options: argparse.Namespace) -> "Load":
    from omniopd_trl.accounting.forecast import forecast
    from omniopd_trl.accounting.pricing import BATCH_TARIFFS, batch_price
    from omniopd_trl.models.loading import load_tokenizer
    from omniopd_trl.teachers.load import capabilities_by_name, split_name
    from omniopd_trl.teachers.options import TeacherOptions
    from omniopd_trl.trainer.plan import prompt_lengths

    provider, model = split_name(args.teacher_model_name_or_path) or ("", args.teacher_model_name_or_path)
    if options.batch and provider not in BATCH_TARIFFS:
        raise ConfigError(
            f"--batch: there are no batches for the teacher {args.teacher_model_name_or_path!r}, only for "
            f"{', '.join(f'{known}:' for known in BATCH_TARIFFS)}. Leave out --batch."
        )
    capabilities = capabilities_by_name(args.teacher_model_name_or_path)
    price = None if capabilities is None else TeacherOptions.of(args).price(provider, model)
    samples = options.num_solutions if capabilities is None else capabilities.samples_per_request
    tokenizer = load_tokenizer(model_args.model_name_or_path, model_args.model_revision, args.trust_remote_code)
    return forecast(
        prompt_tokens=prompt_lengths(dataset, tokenizer, args),
        trajectory_length=1.0,
        samples_per_request=min(samples, options.num_solutions),
        solution_length=options.solution_length or _max_tokens(args),
        num_solutions=options.num_solutions,
        price=batch_price(provider, price) if options.batch and price is not None else price,
        num_prompts=len(dataset),
    ).sft_run


def _max_tokens(args: "OmniOPDConfig") -> int:
    from omniopd_trl.audits.auditor import TEACHER_TOKENS_PER_STUDENT_TOKEN

    return math.ceil(TEACHER_TOKENS_PER_STUDENT_TOKEN * args.max_completion_length)


def _describe(load: "Load", num_prompts: int, args: "OmniOPDConfig", options: argparse.Namespace, folder: str) -> str:
    from omniopd_trl.evals.results import aligned

    most = "" if options.solution_length else "at most "
    rows = [
        ("teacher", args.teacher_model_name_or_path),
        ("solutions", f"{options.num_solutions} for each of {num_prompts:,} prompts, written to {folder}"),
        ("requests", f"{load.requests:,.0f}"),
        ("prompt tokens", f"{load.prompt_tokens:,.0f}, by the student's tokenizer"),
        ("completion tokens", f"{most}{load.completion_tokens:,.0f}"),
    ]
    usd = load.no_cache.usd
    tariff = ", at the price of batches" if options.batch else ""
    rows.append(("dollars", "none or not known" if usd is None else f"{most}{usd:,.4f}{tariff}"))
    for name, limit in (
        ("teacher_budget_usd", args.teacher_budget_usd),
        ("teacher_budget_tokens", args.teacher_budget_tokens),
    ):
        if limit is not None:
            rows.append((name, f"{limit:g}; the command stops before it would be exceeded"))
    return aligned(rows)


def _collect(
    dataset: Any,
    identity: str,
    functions: list[Any] | None,
    folder: str,
    args: "OmniOPDConfig",
    options: argparse.Namespace,
) -> None:
    from omniopd_trl.baselines.collect import SOLUTIONS_FILE, SolutionSettings, collect_solutions
    from omniopd_trl.evals.rewards import Rewards
    from omniopd_trl.journal.reader import spent
    from omniopd_trl.journal.recorder import Recorder
    from omniopd_trl.trainer.preparation import prepare_teacher
    from omniopd_trl.trainer.validation import check_prompts

    try:
        rewards = Rewards.of(args, functions, dataset)
    except MissingExtraError:
        if options.verified:
            raise
        rewards = None
    settings = SolutionSettings(
        options.num_solutions,
        _max_tokens(args),
        args.teacher_temperature,
        args.teacher_top_p,
        args.seed,
        args.max_failed_chunks,
    )
    args.num_rollouts = options.num_solutions  # the samples that the probe asks for
    args.signal = "judge"  # the probe asks a question as well, and continues nothing
    recorder = Recorder(lambda: -1)  # requests outside of blocks belong to none
    teacher = prepare_teacher(args.teacher_model_name_or_path, args, recorder, spent(folder))
    check_prompts(teacher, [("train_dataset", dataset)], args.teacher_context)
    progress = collect_solutions(
        teacher,
        dataset,
        folder,
        settings,
        recorder,
        identity=identity,
        rewards=rewards,
        only_verified=options.verified,
        context=args.teacher_context,
        in_batches=options.batch,
        report=say,
    )
    if not progress.num_kept:
        raise DataError(
            f"No solution was kept: {progress}. Nothing can be trained on {folder}. Raise max_completion_length if "
            "they are cut off, and leave out --verified if they are wrong."
        )
    train = ["omniopd", "train", "--config", options.config, "--method", "sft", "--output_dir", args.output_dir]
    if Path(folder) != Path(args.output_dir, "solutions"):
        train += ["--solutions", folder]
    say(f"\nWrote {Path(folder, SOLUTIONS_FILE)}. Train on it: {shlex.join(train)}")
