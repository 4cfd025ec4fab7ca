# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""`omniopd cost`: forecast tokens, dollars, memory and time of a recipe, without any request."""

import argparse
import math
import sys
from collections.abc import Sequence
from importlib.metadata import version
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple

from omniopd_trl.cli import hardware
from omniopd_trl.cli.opening import check_models, open_recipe, with_recipe
from omniopd_trl.cli.options import number, positive_int
from omniopd_trl.cli.tables import columns
from omniopd_trl.errors import ConfigError, DataError

if TYPE_CHECKING:
    from omniopd_trl.accounting.forecast import Forecast, Load
    from omniopd_trl.accounting.pricing import Price
    from omniopd_trl.trainer.omniopd_config import OmniOPDConfig
    from omniopd_trl.trainer.plan import Requests

# A stream has no length; this many of its first prompts are measured.
_STREAMED_PROMPTS = 1000

_WITHOUT = (
    "Without a network, student and dataset must be local or in the cache; or give the mean length of a prompt with "
    "`--prompt_length`, and the steps with `--max_steps`."
)

_ASSUMED = "assumed: max_completion_length, the upper bound; --trajectory_length sets another"


_POSITIVE = number("a number above 0", lambda value: 0 < value < math.inf)
_SHARE = number("a number from 0 to 1", lambda value: 0 <= value <= 1)


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser of `omniopd`."""
    parser = commands.add_parser(
        "cost",
        help="forecast tokens, dollars, memory and time of a recipe",
        description="Forecast the tokens and dollars that a recipe takes from its teacher: per trajectory, per step "
        "and for the run, with and without a prompt cache, compared with one solution per prompt (SFT). --gpu adds "
        "memory per GPU and time per step. Prompts are measured with the student's tokenizer; nothing is sent to the "
        "teacher.",
        epilog="Any option of the training command may be added and overrides the recipe: --num_chunks 5.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="RECIPE", help="the recipe, a YAML file")
    parser.add_argument(
        "--trajectory_length",
        type=_POSITIVE,
        metavar="L",
        help="mean length of a trajectory in tokens. Defaults to the mean in the logs of the newest checkpoint in "
        "`output_dir`, and without a checkpoint to `max_completion_length`, the upper bound",
    )
    parser.add_argument(
        "--solution_length",
        type=_POSITIVE,
        metavar="S",
        help="mean length of a solution by the teacher in tokens, for SFT. Defaults to the length of a trajectory",
    )
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument(
        "--max_prompts",
        type=positive_int,
        metavar="K",
        help="measure K prompts, evenly spaced in the dataset, instead of all",
    )
    prompts.add_argument(
        "--prompt_length",
        type=_POSITIVE,
        metavar="T",
        help="mean length of a prompt in tokens. If set, neither the dataset nor the student's tokenizer is loaded, "
        "and `max_steps` is required",
    )
    parser.add_argument(
        "--chunks_per_trajectory",
        type=_POSITIVE,
        metavar="K",
        help="mean number of chunks per trajectory, logged as `audit/num_chunks`. Defaults to `num_chunks`, or to as "
        "many as fit into a trajectory",
    )
    parser.add_argument(
        "--rollout_tokens",
        type=_POSITIVE,
        metavar="W",
        help="mean number of tokens per rollout: the logged `teacher/completion_tokens` divided by the prompts per "
        "step, the chunks per trajectory and the rollouts per chunk. Defaults to the maximum of a request",
    )
    parser.add_argument(
        "--rollout_share",
        type=_SHARE,
        metavar="S",
        help="share of the chunks that get rollouts with `signal: cascade`: the logged `judge/frac_rollouts`. "
        "Defaults to 1, the upper bound",
    )
    parser.add_argument(
        "--stopped_share",
        type=_SHARE,
        metavar="S",
        help="share of the chunks that get no more than `first_rollouts`: the logged `audit/frac_stopped`. Defaults "
        "to what a run or a probe in the recipe's `output_dir` has measured, or to 0, the upper bound of the cost",
    )
    parser.add_argument(
        "--num_processes",
        type=positive_int,
        default=1,
        metavar="P",
        help="number of processes of the run (default: 1)",
    )
    hardware.add_options(parser)
    parser.add_argument(
        "--samples_per_request",
        type=positive_int,
        metavar="K",
        help="number of samples per request. Defaults to what the teacher is known to support",
    )
    parser.add_argument(
        "--tokens_per_token",
        type=_POSITIVE,
        default=1.0,
        metavar="R",
        help="number of teacher tokens per student token (default: 1.0)",
    )


class _Prompts(NamedTuple):
    """Lengths of the measured prompts, in tokens."""

    lengths: list[float]
    total: int | None  # rows of the dataset; `None` for a stream, or when the dataset was not read


def run(options: argparse.Namespace, rest: Sequence[str]) -> None:
    """Print the forecast of a recipe.

    Args:
        options: options of the command.
        rest: options of the training command.

    Raises:
        OmniOPDError: when the recipe, its dataset or its student's tokenizer cannot be used.
    """
    # This machine may not be the one that trains, and may have no GPU with bf16.
    arguments = [*with_recipe("cost", options.config, rest), "--use_cpu", "true"]
    read = ("model_name_or_path", "dataset_name") if options.prompt_length is None else ()
    arguments, _ = open_recipe(arguments, read)

    from transformers.utils import logging

    from omniopd_trl.cli.recipe import load_splits, parse_args
    from omniopd_trl.data.checks import prompts_per_step
    from omniopd_trl.evals.results import aligned
    from omniopd_trl.models.loading import load_tokenizer
    from omniopd_trl.teachers.load import capabilities_by_name, is_export, split_name
    from omniopd_trl.teachers.options import TeacherOptions
    from omniopd_trl.trainer.plan import (
        Requests,
        forecast_run,
        num_steps,
        stopped_share_of,
        trajectory_length_of,
    )

    logging.set_verbosity_error()
    script_args, args, model_args, dataset_args = parse_args(arguments, "omniopd cost --config RECIPE.yaml")
    teacher = args.teacher_model_name_or_path
    method = script_args.method
    named = {} if method == "grpo" else {"teacher_model_name_or_path": teacher}
    check_models(options.config, model_name_or_path=model_args.model_name_or_path, **named)
    if method == "opd":
        from omniopd_trl.baselines.opd import check_is_local

        check_is_local(teacher)
    elif method == "grpo" or teacher is None:
        teacher = "scripted"  # none is asked

    if options.accelerate_config and options.gpu is None:
        raise ConfigError(f"--accelerate_config {options.accelerate_config} has no effect without --gpu.")
    if options.gpu is not None:  # what cannot be calculated is refused before the dataset is read
        hardware.job_of(options, script_args, args, model_args, 0)
    if is_export(teacher):
        raise ConfigError(f"The teacher {teacher!r} is an export: training from it asks no teacher and costs nothing.")
    provider, model = split_name(teacher) or ("", teacher)
    capabilities = capabilities_by_name(teacher)
    price, prices = None, (args.teacher_input_price, args.teacher_output_price, args.teacher_cached_price)
    if method not in ("opd", "grpo") and (capabilities is not None or any(value is not None for value in prices)):
        price = TeacherOptions.of(args).price(provider, model)
    tokenizer = None
    if options.prompt_length is None:
        try:
            tokenizer = load_tokenizer(
                model_args.model_name_or_path, model_args.model_revision, args.trust_remote_code
            )
            splits = load_splits(script_args, dataset_args)
        except DataError as error:
            raise DataError(f"{error} {_WITHOUT}") from error
        prompts = _measure_prompts(splits, script_args, args, tokenizer, options.max_prompts)
    elif args.max_steps > 0:
        prompts = _Prompts([options.prompt_length], None)
    else:
        raise ConfigError(
            "--prompt_length leaves the dataset unread, so the number of steps must be given. Add `--max_steps`."
        )
    sizes = (args.per_device_train_batch_size, args.gradient_accumulation_steps, options.num_processes)
    generations = args.num_generations if method in ("omniopd", "grpo") else 1
    per_step = prompts_per_step(*sizes, generations)
    steps = num_steps(args, prompts.total, options.num_processes, generations)
    if options.trajectory_length is not None:
        trajectory_length, source = options.trajectory_length, "as given"
    else:
        trajectory_length, checkpoint = trajectory_length_of(args)
        source = f"measured in {checkpoint}" if checkpoint is not None else _ASSUMED
    share: dict[str, float] = {} if options.rollout_share is None else {"rollout_share": options.rollout_share}
    if share and args.signal != "cascade":
        raise ConfigError(
            f"--rollout_share {options.rollout_share:g} has no effect with signal={args.signal!r}. Leave it out."
        )
    if options.stopped_share is not None and not args.first_rollouts:
        raise ConfigError(
            f"--stopped_share {options.stopped_share:g} has no effect with first_rollouts=0. Leave it out."
        )
    stopped = stopped_share_of(args) if options.stopped_share is None else (options.stopped_share, "as given")
    requests = Requests.of(args, capabilities, tokenizer, options.samples_per_request)
    result = forecast_run(
        args,
        requests,
        price,
        prompt_tokens=prompts.lengths,
        trajectory_length=trajectory_length,
        trajectories_per_step=math.prod(sizes),
        steps=steps,
        num_rows=prompts.total,
        tokens_per_token=options.tokens_per_token,
        chunks_per_trajectory=options.chunks_per_trajectory,
        rollout_tokens=options.rollout_tokens,
        solution_length=options.solution_length,
        stopped_share=stopped[0],
        **share,
    )
    length, name = trajectory_length, "trajectory length"
    if method == "sft":
        length, name = options.solution_length or trajectory_length, "solution length"
        source = source if options.solution_length is None else "as given"
    if method == "omniopd":
        head = _describe_audits(args, options, requests, stopped)
        table = {
            "trajectory": result.trajectory,
            "step": result.step,
            "run": result.run,
            "SFT, one solution per prompt": result.sft_run,
        }
        notes = _notes(script_args, args, options, requests, result)
    elif method == "sft":
        head, table = [], {"omniopd solutions, one per prompt": result.sft_run}
        notes = _sft_notes(args, provider, result.sft_run)
    else:
        head, table = [], {}
        more = "" if options.gpu else " --gpu adds memory and time."
        notes = [f"method={method!r} sends no request to a service.{more}"]
        teacher = f"{teacher}, in the same process" if method == "opd" else "none"
    if table and capabilities is not None and capabilities.reasoning_headroom and options.rollout_tokens is None:
        notes.append(
            f"The reasoning of {teacher} cannot be switched off: a sample may take up to "
            f"{capabilities.reasoning_headroom:,} completion tokens more."
        )
    each = "" if generations == 1 else f", {generations} trajectories each"
    rows = [
        ("method", method),
        ("teacher", teacher),
        *([("price", _describe_price(price, args, is_service=capabilities is not None))] if table else []),
        *head,
        ("prompts", _describe_prompts(prompts, options.prompt_length)),
        (name, f"{length:,.0f} tokens, {source}"),
        ("run", f"{steps:,} steps of {per_step:,} prompts{each}"),
    ]
    if options.gpu is not None:
        job = hardware.job_of(options, script_args, args, model_args, max(prompts.lengths))
        with_prompt = length + sum(prompts.lengths) / len(prompts.lengths)
        on_service = result.step if method == "omniopd" and capabilities is not None else None
        more_rows, more_notes = hardware.describe(job, args, model_args, with_prompt, on_service)
        rows, notes = [*rows, *more_rows], [*notes, *more_notes]
    lines = [aligned(rows), "", *([*_table(table), ""] if table else []), *notes]
    sys.stdout.write("\n".join(lines) + "\n")


def _describe_audits(
    args: "OmniOPDConfig", options: argparse.Namespace, requests: "Requests", stopped: tuple[float, str]
) -> list[tuple[str, str]]:
    from omniopd_trl.trainer.plan import branches_row, first_rollouts_row

    chunks = f"at most M = {args.num_chunks} of C = {args.chunk_length} tokens"
    if options.chunks_per_trajectory is not None:
        chunks += f", {options.chunks_per_trajectory:g} on average, as given"
    if options.rollout_tokens is not None:
        chunks += f"; {options.rollout_tokens:g} tokens per rollout, as given"
    samples = f"{requests.samples} of N = {args.num_rollouts}"
    if args.signal == "judge":
        samples = "1, with all marks of a trajectory"
    rows = [("samples per request", samples), ("chunks", chunks)]
    rows += [branches_row(args)] if args.num_branches else []
    rows += [first_rollouts_row(args, *stopped)] if args.first_rollouts else []
    return rows


def _measure_prompts(
    splits: Any, script_args: Any, args: "OmniOPDConfig", tokenizer: Any, max_prompts: int | None
) -> _Prompts:
    """Lengths of the training prompts in student tokens, as the teacher sees them."""
    from datasets import Dataset

    from omniopd_trl.data.checks import check_dataset
    from omniopd_trl.data.datasets import get_split
    from omniopd_trl.data.prompts import prepare_prompts
    from omniopd_trl.trainer.plan import prompt_lengths, some_rows

    dataset = get_split(splits, script_args.dataset_train_split, "dataset_train_split")
    total = len(dataset) if isinstance(dataset, Dataset) else None
    dataset = some_rows(dataset, max_prompts or total or _STREAMED_PROMPTS)
    dataset = prepare_prompts(dataset, script_args.prompt_template)
    check_dataset(dataset)
    args.teacher_context.check(dataset)
    return _Prompts(prompt_lengths(dataset, tokenizer, args), total)


def _describe_prompts(prompts: _Prompts, given: float | None) -> str:
    if given is not None:
        return f"{given:g} tokens, as given"
    total = "a stream" if prompts.total is None else f"{prompts.total:,}"
    mean, longest = sum(prompts.lengths) / len(prompts.lengths), max(prompts.lengths)
    return f"{len(prompts.lengths):,} of {total} measured: {mean:,.1f} tokens on average, at most {longest:,}"


def _describe_price(price: "Price | None", args: "OmniOPDConfig", *, is_service: bool) -> str:
    if price is None and not is_service:
        return "none: the teacher is not behind a service"
    if price is None:
        return "not known, tokens only; set teacher_input_price and teacher_output_price for dollars"
    parts = [f"{price.input:g} in", f"{price.output:g} out"]
    if price.cache_read is not None:
        parts.append(f"{price.cache_read:g} read from the cache")
    if price.cache_write is not None:
        parts.append(f"{price.cache_write:g} written to it")
    source = f"genai-prices {version('genai-prices')}" if args.teacher_input_price is None else "the recipe"
    return f"{', '.join(parts)} (dollars per million tokens, from {source})"


# Rows of the table: the label, what it shows of a load, and whether it is about prompt caches.
_ROWS = (
    ("requests", "requests", False),
    ("prompt tokens", "prompt_tokens", False),
    ("  a cache per chunk serves", "chunk_cache.cached_tokens", True),
    ("  a cache per trajectory serves", "trajectory_cache.cached_tokens", True),
    ("completion tokens", "completion_tokens", False),
    ("  of them compared", "kept_tokens", True),
    ("dollars, no prompt cache", "no_cache.usd", False),
    ("dollars, a cache per chunk", "chunk_cache.usd", True),
    ("dollars, a cache per trajectory", "trajectory_cache.usd", True),
)


def _table(table: "dict[str, Load]") -> list[str]:
    """The table of loads, one column each. Dollars are left out where the price is not known."""
    cached = len(table) > 1 or any(load.trajectory_cache.cached_tokens for load in table.values())
    rows: list[tuple[str, ...]] = [("", *table)]
    for label, name, is_of_caches in _ROWS:
        values = [attrgetter(name)(load) for load in table.values()]
        if None not in values and (cached or not is_of_caches):
            digits = [(4 if value < 1 else 2) if name.endswith("usd") else 0 for value in values]
            rows.append((label, *(f"{value:,.{n}f}" for value, n in zip(values, digits, strict=True))))
    return columns(rows)


def _notes(
    script_args: Any,
    args: "OmniOPDConfig",
    options: argparse.Namespace,
    requests: "Requests",
    result: "Forecast",
) -> list[str]:
    """Notes on what the numbers leave out, how they compare with the budget, and which are upper bounds."""
    from omniopd_trl.trainer.plan import LETTERS_PER_TOKEN, left_out

    notes = ["Tokens are counted with the student's tokenizer. Requests that are retried after an error come on top."]
    if args.audit_eval or script_args.evaluate_teacher:
        notes.append("The teacher's requests during evaluation (audit_eval, evaluate_teacher) come on top.")
    if args.chunk_overlap == "merge" and (options.chunks_per_trajectory is None or options.rollout_tokens is None):
        notes.append(
            "chunk_overlap='merge' makes fewer and longer chunks, and every request of a trajectory asks for as many "
            "tokens as the longest chunk needs: a run may take more than this. Pass what a run has logged with "
            "--chunks_per_trajectory and --rollout_tokens."
        )
    notes += _budget_notes(args, result.run)
    if args.signal == "cascade" and options.rollout_share is None:
        notes.append(
            "The cascade is counted as if all marks were between cascade_low and cascade_high, the upper bound: "
            "pass the logged judge/frac_rollouts with --rollout_share."
        )
    if options.chunks_per_trajectory is None and (reasons := left_out(args)):
        notes.append(
            f"{reasons}. All are counted, the upper bound: pass the logged audit/num_chunks with "
            "--chunks_per_trajectory."
        )
    # That of the judge, where no other is added.
    instruction = requests.judge_overhead if args.signal == "judge" else requests.overhead or requests.judge_overhead
    if instruction and options.prompt_length is not None:
        notes.append(
            f"The instruction that is added to every prompt is counted at {LETTERS_PER_TOKEN} letters per token: "
            f"{instruction} tokens."
        )
    return notes


def _sft_notes(args: "OmniOPDConfig", provider: str, load: "Load") -> list[str]:
    from omniopd_trl.accounting.pricing import BATCH_TARIFFS

    notes = ["Tokens are counted with the student's tokenizer. `omniopd solutions` sends the requests, training none."]
    usd = load.no_cache.usd
    if usd is not None and provider in BATCH_TARIFFS:
        notes.append(
            f"In batches (`omniopd solutions --batch`) it costs {BATCH_TARIFFS[provider] * usd:,.4f} dollars."
        )
    return notes + _budget_notes(args, load)


def _budget_notes(args: "OmniOPDConfig", load: "Load") -> list[str]:
    """Whether the budgets of the recipe are enough for a load."""
    notes = []
    budgets: list[tuple[str, float | None, float | None]] = [
        ("teacher_budget_usd", args.teacher_budget_usd, load.no_cache.usd),
        ("teacher_budget_tokens", args.teacher_budget_tokens, load.prompt_tokens + load.completion_tokens),
    ]
    for name, limit, expected in budgets:
        if limit is None:
            continue
        if expected is None:
            notes.append(f"{name}={limit:g} cannot be kept without a price: the run would refuse to start.")
            continue
        verdict = "is enough" if expected <= limit else "is not enough: the run would stop early"
        notes.append(f"{name}={limit:g} {verdict} (without a prompt cache, {expected / limit:.0%} of it).")
    return notes
