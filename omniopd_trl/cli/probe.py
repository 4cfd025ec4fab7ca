# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""`omniopd probe`: before training, and for about a dollar, whether a recipe will teach, and what to set."""

import argparse
import copy
import json
import logging
import math
import os
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from omniopd_trl.cli.opening import check_models, check_writable, open_recipe, with_recipe
from omniopd_trl.cli.options import number, positive_int
from omniopd_trl.cli.tables import columns
from omniopd_trl.errors import BudgetError, ConfigError, NoRolloutError, OmniOPDError

if TYPE_CHECKING:
    from omniopd_trl.accounting.pricing import Price
    from omniopd_trl.evals.probe import Verdict
    from omniopd_trl.evals.probe.costs import Row
    from omniopd_trl.trainer.omniopd_config import OmniOPDConfig
    from omniopd_trl.trainer.probing import Probed

# Branches when the recipe has none, and trajectories of a generation batch. When the cap is reached, the batches
# before are complete.
_BRANCHES, _BATCH = 7, 8
# The share of the cap that the forecast of the recipe's own continuation may take, and the trajectories that are also
# audited with another continuation.
_SHARE, _COMPARED = 0.7, 16

PAGE = "probe.md"


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser of `omniopd`."""
    parser = commands.add_parser(
        "probe",
        help="measure on some prompts, for about a dollar, whether a recipe will teach, and what to set",
        description="Let the student of a recipe answer some training prompts and continue each fork several times, "
        "ask the teacher for rollouts or marks at the forks, and measure refusals, agreement, differences between the "
        "student's branches, latency and price. Prints a verdict and recommended options, and trains nothing. "
        "Answers are recorded as they arrive: started again, the command continues and pays for nothing twice.",
        epilog="Any option of the training command may be added and overrides the recipe: --similarity rouge1.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="RECIPE", help="the recipe, a YAML file")
    parser.add_argument(
        "--max_usd",
        type=number("a number of dollars above 0", lambda value: 0 < value < math.inf),
        default=1.0,
        metavar="D",
        help="dollars that the probe may spend in its folder, earlier starts included (default: 1). Each request is "
        "reserved before it is sent",
    )
    parser.add_argument(
        "--num_prompts",
        type=positive_int,
        default=32,
        metavar="P",
        help="prompts of the recipe, in whole batches of up to 8 (default: 32)",
    )
    parser.add_argument(
        "--probe_dir", metavar="DIR", help="folder of the probe (default: `probe` in the recipe's `output_dir`)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


class _Plan(NamedTuple):
    """What a probe does.

    Attributes:
        arguments: the command line of the training command.
        settings: options that replace the recipe's.
        batches: generation batches.
        forks: forks per trajectory.
        max_usd: the cap; `None` where nothing is paid, or another limit holds.
        max_tokens: the recipe's limit in tokens; `None` without one.
        price: price of the teacher.
        samples_per_request: as the teacher is known to support; `None` if one request returns all samples.
    """

    arguments: list[str]
    settings: dict[str, Any]
    batches: int
    forks: int
    max_usd: float | None
    max_tokens: int | None
    price: "Price | None"
    samples_per_request: int | None

    def command(self, folder: Path, **changes: Any) -> list[str]:
        """The command line with the options of the probe."""
        settings = {**self.settings, "output_dir": folder, **changes}
        return [*self.arguments, *(part for name, value in settings.items() for part in (f"--{name}", str(value)))]


def run(options: argparse.Namespace, rest: Sequence[str]) -> None:
    """Probe, and print the numbers, the verdict and the recommended options.

    Args:
        options: options of the command.
        rest: options of the training command.

    Raises:
        OmniOPDError: when the recipe, its dataset or its teacher cannot be used.
    """
    arguments, _ = open_recipe(with_recipe("probe", options.config, rest))

    from datasets import Dataset

    from omniopd_trl.cli.recipe import load_prompts, parse_args
    from omniopd_trl.evals.probe import Form, Verdict, judge, measure, measure_marks
    from omniopd_trl.evals.probe.costs import answers_of, costs_of
    from omniopd_trl.journal.reader import spent
    from omniopd_trl.report.runs import without_folders
    from omniopd_trl.teachers.load import is_export
    from omniopd_trl.trainer.plan import PROBE_FOLDER, num_steps
    from omniopd_trl.trainer.probing import AGAIN

    script_args, args, model_args, dataset_args = parse_args(arguments, "omniopd probe --config RECIPE.yaml")
    check_models(
        options.config,
        model_name_or_path=model_args.model_name_or_path,
        teacher_model_name_or_path=args.teacher_model_name_or_path,
    )
    if is_export(args.teacher_model_name_or_path):
        raise ConfigError(
            f"The teacher {args.teacher_model_name_or_path!r} is an export: it answers its own run only, and nothing "
            "can be asked. `omniopd audits` shows what it holds."
        )
    folder = Path(options.probe_dir or os.path.join(args.output_dir, PROBE_FOLDER))
    check_writable(folder)
    dataset = load_prompts(script_args, dataset_args)
    rows = len(dataset) if isinstance(dataset, Dataset) else None
    steps = num_steps(args, rows, 1, args.num_generations)
    trajectories = steps * args.per_device_train_batch_size * args.gradient_accumulation_steps
    plan = _plan(arguments, args, model_args, dataset, rows, options)
    has_marks = args.signal != "rollouts"
    other = None if has_marks else _other_continuation(args)
    elsewhere = folder / (AGAIN if has_marks else "other")

    form = Form(**{field.name: getattr(args, field.name) for field in fields(Form)})
    failures: Counter[str] = Counter()
    found: list[Probed] = []
    stopped: str | None = None
    try:
        found, stopped, settings, tokenizer = _probe(plan, dataset, folder, elsewhere)
    except NoRolloutError as error:
        verdict = Verdict("will not", str(error).rstrip("."))
        numbers, answers = None, answers_of([], has_marks)
    else:
        failures.update(failure for row in found for failure in row.audit.failures)
        audits = [row[:3] for row in found]
        if has_marks:
            thresholds = (args.cascade_low, args.cascade_high)
            numbers = measure_marks(audits, [row.again for row in found], tokenizer, settings, thresholds)
        else:
            numbers = measure(audits, tokenizer, settings, args.similarity)
        answers = answers_of(_records(found), has_marks)
        unwilling = (answers["refused"] + answers["restarted"]) / (answers["samples"] or 1)
        verdict = judge(numbers, form, next((text for text, _ in failures.most_common(1)), stopped), unwilling)
    compared: dict[str, Any] = {}
    if other is not None and numbers is not None and numbers.signals:
        compared = _compare(plan, dataset, folder, other, found, args, (settings, tokenizer))

    (usage, usd), (other_usage, other_usd) = spent(folder), spent(elsewhere)
    usage, usd = usage + other_usage, usd + other_usd
    recommended = {advice.option: advice.value for advice in verdict.advice}
    result = {
        "teacher": without_folders(args.teacher_model_name_or_path),
        "student": without_folders(model_args.model_name_or_path),
        "verdict": verdict.kind,
        "reason": verdict.reason,
        "options": recommended,
        "reasons": {advice.option: advice.reason for advice in verdict.advice},
        "measured": None if numbers is None else asdict(numbers),
        "answers": answers,
        "failures": dict(failures.most_common()),
        "continuations": compared,
        "cost": costs_of(
            _records(found), numbers, form, recommended, plan.price, plan.samples_per_request, trajectories
        ),
        "paid": {"usd": usd, "prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens},
        "stopped": stopped,
    }
    _write(_without_infinities(result), verdict, folder, options)


# ---- Before anything is asked ----


def _plan(
    arguments: list[str],
    args: "OmniOPDConfig",
    model_args: Any,
    dataset: Any,
    rows: int | None,
    options: argparse.Namespace,
) -> _Plan:
    """The size of the probe: as many forks per trajectory as the cap allows for all prompts.

    More trajectories tell more than more forks of one, which depend on each other. A judge reads the whole trajectory,
    so fewer forks would save next to nothing.
    """
    from omniopd_trl.evals.probe.costs import ROLLOUTS_OF_A_FORK
    from omniopd_trl.models.loading import load_tokenizer
    from omniopd_trl.teachers.load import capabilities_by_name, is_service, split_name
    from omniopd_trl.teachers.options import TeacherOptions
    from omniopd_trl.trainer.plan import Requests, forecast_run, prompt_lengths, some_rows, trajectory_length_of

    teacher = str(args.teacher_model_name_or_path)
    provider, model = split_name(teacher) or ("", teacher)
    tokenizer = load_tokenizer(model_args.model_name_or_path, model_args.model_revision, args.trust_remote_code)
    capabilities = capabilities_by_name(teacher)
    max_usd: float | None = None
    price = None
    if is_service(teacher):
        price = TeacherOptions.of(args).price(provider, model)
        # A vLLM server has no price. Any other service without a known one needs a limit in tokens.
        if price is not None or not (provider == "vllm" or args.teacher_budget_tokens):
            max_usd = min(options.max_usd, args.teacher_budget_usd or math.inf)
    prompts = min(options.num_prompts, rows or options.num_prompts)
    forks = args.num_chunks
    if price is not None and max_usd is not None and args.signal == "rollouts":
        asked = copy.copy(args)
        asked.num_rollouts, asked.first_rollouts, asked.num_generations = ROLLOUTS_OF_A_FORK, 0, 1
        load = forecast_run(
            asked,
            Requests.of(asked, capabilities, tokenizer),
            price,
            prompt_tokens=prompt_lengths(some_rows(dataset, prompts), tokenizer, args),
            trajectory_length=trajectory_length_of(args)[0],
            trajectories_per_step=1,
            steps=prompts,
            num_rows=None,
        ).run
        for_one = (load.no_cache.usd or 0.0) / args.num_chunks
        forks = max(1, min(forks, math.floor(_SHARE * max_usd / for_one))) if for_one else forks
    per_device = min(args.per_device_train_batch_size, _BATCH, prompts)
    accumulation = max(1, min(_BATCH, prompts) // per_device)
    settings = {
        "method": "omniopd",
        "num_branches": args.num_branches or _BRANCHES,
        "num_rollouts": ROLLOUTS_OF_A_FORK,
        "first_rollouts": 0,
        "min_rollouts": min(args.min_rollouts, ROLLOUTS_OF_A_FORK),
        "teacher_temperature": args.teacher_temperature or 1.0,
        "posterior_baseline": "none",
        "prior": "policy",
        # The verifier needs no teacher.
        **{"num_generations": 1, "reward_weight": 0.0, "audit_trajectories": "all"},
        "per_device_train_batch_size": per_device,
        "gradient_accumulation_steps": accumulation,
        "max_steps": 1,
        # Whether too many forks fail is part of the verdict.
        "max_failed_chunks": 1.0,
        # Nothing is trained, so there is no reference.
        "beta": 0.0,
        **dict.fromkeys(("do_eval", "eval_on_start", "audit_eval", "push_to_hub", "resume_from_checkpoint"), False),
        **dict.fromkeys(("eval_strategy", "save_strategy"), "no"),
        "load_best_model_at_end": False,
        "report_to": "none",
        "save_audits": True,
    }
    if args.signal != "rollouts":  # the marks alone: they tell how many rollouts a cascade asks for
        settings |= {"signal": "judge", "min_rollouts": 1, "teacher_temperature": args.teacher_temperature}
        for name in ("cascade_low", "cascade_high", "rollout_imitation", "rollout_imitation_tokens"):
            settings[name] = type(args).__dataclass_fields__[name].default
    batches = math.ceil(prompts / (per_device * accumulation))
    samples = None if capabilities is None else capabilities.samples_per_request
    return _Plan(arguments, settings, batches, forks, max_usd, args.teacher_budget_tokens, price, samples)


def _other_continuation(args: "OmniOPDConfig") -> str | None:
    """The continuation to compare with: instructed beside exact, where the model allows both; `None` elsewhere."""
    from omniopd_trl.teachers.load import capabilities_by_name

    capabilities = capabilities_by_name(str(args.teacher_model_name_or_path))
    if capabilities is None:
        return None
    own = args.teacher_continuation or capabilities.continuation
    if own != "instruct":
        return "instruct"
    return None if capabilities.continuation == "instruct" else str(capabilities.continuation)


# ---- Measuring ----


def _probe(
    plan: _Plan,
    dataset: Any,
    folder: Path,
    elsewhere: Path,
    batches: int | None = None,
    **changes: Any,
) -> tuple[Any, ...]:
    """Audit the prompts in a folder.

    Args:
        plan: the plan.
        dataset: the training set.
        folder: where the audits are recorded.
        elsewhere: the folder of the other continuation, or of the second marks. What was spent there counts in the
            same limits.
        batches: generation batches; `None` for those of the plan.
        **changes: options that replace those of the plan.

    Returns:
        The audits, why the cap stopped them, the settings of the auditor, and the student's tokenizer.

    Raises:
        BudgetError: when nothing is left of a limit.
    """
    from omniopd_trl.cli.recipe import parse_args
    from omniopd_trl.cli.train import set_init_kwargs
    from omniopd_trl.journal.reader import spent
    from omniopd_trl.trainer.probing import ProbingTrainer

    usage, usd = spent(elsewhere)
    for name, limit, there in (
        ("teacher_budget_usd", plan.max_usd, usd),
        ("teacher_budget_tokens", plan.max_tokens, usage.prompt_tokens + usage.completion_tokens),
    ):
        if limit is None:
            continue
        if limit <= there:
            raise BudgetError(f"{there:g} of {name}={limit:g} are spent in {elsewhere}. Raise it, or `--max_usd`.")
        changes[name] = limit - there
    # Its warnings are about training, and nothing is trained.
    logging.getLogger("omniopd_trl.trainer.startup").setLevel(logging.ERROR)
    _, args, model_args, _ = parse_args(plan.command(folder, **changes))
    set_init_kwargs(args, model_args)

    from trl import get_peft_config, get_quantization_config

    trainer = ProbingTrainer(
        forks_per_trajectory=plan.forks,
        model=model_args.model_name_or_path,
        teacher_model=args.teacher_model_name_or_path,
        args=args,
        train_dataset=dataset,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    found, stopped = trainer.probe(plan.batches if batches is None else batches)
    return found, stopped, trainer.auditor.settings, trainer.processing_class


def _compare(
    plan: _Plan,
    dataset: Any,
    folder: Path,
    other: str,
    found: "list[Probed]",
    args: "OmniOPDConfig",
    judging: tuple[Any, Any],
) -> dict[str, Any]:
    """Both continuations on the same trajectories; the failure of the other one when it cannot be measured."""
    from omniopd_trl.evals.probe import measure
    from omniopd_trl.evals.probe.costs import answers_of

    settings = plan.settings
    per_step = settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"]
    batches = min(plan.batches, max(1, _COMPARED // per_step))
    try:
        others, *_ = _probe(plan, dataset, folder / "other", folder, batches=batches, teacher_continuation=other)
    except OmniOPDError as error:  # the numbers of the recipe's own are paid for, and are printed
        return {other: {"failure": str(error)}}
    own = args.teacher_continuation or "the recipe's"
    there = {(row.record.step, row.record.index) for row in others}
    here = [row for row in found if (row.record.step, row.record.index) in there]
    compared = {}
    for name, rows in ((own, here), (other, others)):
        numbers = measure([row[:3] for row in rows], judging[1], judging[0], args.similarity)
        first = numbers.signals[0] if numbers.signals else None
        compared[name] = {
            **answers_of(_records(rows), has_marks=False),
            "forks": numbers.num_asked - numbers.num_dropped,
            "agreement": None if first is None else first.matched,
            "gap": None if first is None else first.gap,
        }
    return compared


def _records(found: "Sequence[Probed]") -> "list[Row]":
    return [(row.audit, row.record) for row in found]


def _without_infinities(value: Any) -> Any:
    """JSON has no infinity: a standard error that is not known is null."""
    if isinstance(value, dict):
        return {key: _without_infinities(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_infinities(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---- Printing ----


def _write(result: dict[str, Any], verdict: "Verdict", folder: Path, options: argparse.Namespace) -> None:
    """Write the result and the page, and print one of them."""
    from omniopd_trl.report.runs import PROBE

    text = _text(result, verdict)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PROBE).write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    page = f"# Probe of {options.config}\n\n**{verdict.kind}**: {verdict.reason}.\n\n```text\n{text}\n```\n"
    (folder / PAGE).write_text(page, encoding="utf-8")
    if options.json:
        sys.stdout.write(json.dumps(result, indent=1) + "\n")
    else:
        written = f"Wrote {folder / PROBE} and {folder / PAGE}. The audits: omniopd report {shlex.quote(str(folder))}"
        sys.stdout.write(f"{text}\n\n{written}\n")


def _text(result: dict[str, Any], verdict: "Verdict") -> str:
    from omniopd_trl.evals.results import aligned
    from omniopd_trl.report.probe import cost_rows, measured_rows, signal_rows

    models = [("teacher", str(result["teacher"])), ("student", str(result["student"]))]
    parts = [aligned([*models, *measured_rows(result), *cost_rows(result)])]
    measured = result["measured"]
    if measured is not None and measured["signals"]:
        titles, signals = signal_rows(measured["signals"])
        parts.append("\n".join(columns([titles, *signals])))
    if result["stopped"]:
        advice = "With a larger --max_usd the same command continues, and asks nothing again."
        parts.append(f"The probe stopped early: {result['stopped']} {advice}")
    parts.append(f"verdict  {verdict}.")
    if verdict.advice:
        parts.append(aligned([(f"{a.option}: {_yaml(a.value)}", f"# {a.reason}") for a in verdict.advice]))
    return "\n\n".join(parts)


def _yaml(value: Any) -> str:
    return json.dumps(value) if not isinstance(value, str) else value
