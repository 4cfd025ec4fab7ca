# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The plan that a run prints at its start, with the forecast that `omniopd cost` prints."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainerState
from transformers.utils import logging

from omniopd_trl.accounting.forecast import Forecast, forecast, least_stopped_share
from omniopd_trl.accounting.pricing import Price
from omniopd_trl.audits.auditor import TEACHER_TOKENS_PER_STUDENT_TOKEN
from omniopd_trl.data.checks import check_step_is_filled, prompt_ids, prompts_per_step
from omniopd_trl.errors import ConfigError
from omniopd_trl.evals.results import aligned
from omniopd_trl.report.runs import PROBE
from omniopd_trl.teachers import Teacher
from omniopd_trl.teachers.instruct.judge import Passage, render_question
from omniopd_trl.teachers.instruct.prompt import render_messages
from omniopd_trl.trainer.checkpoints import checkpoints_of, state_of
from omniopd_trl.trainer.exported import Export
from omniopd_trl.trainer.omniopd_config import OmniOPDConfig

logger = logging.get_logger(__name__)

# Prompts that the plan measures: evenly spaced in a dataset, or the first ones of a stream, which is read again.
_MEASURED, _STREAMED = 1000, 100

# Where `omniopd probe` writes its numbers, in the `output_dir` of the recipe.
PROBE_FOLDER = "probe"

# An average of English prose, for when no tokenizer is loaded.
LETTERS_PER_TOKEN = 4


class Requests(NamedTuple):
    """What a teacher makes of the chunks of a run.

    Attributes:
        samples: samples per request.
        min_cached_prefix: shortest prompt that the service caches, in tokens; 0 if unknown.
        overhead: tokens that an instruction adds to each prompt.
        judge_overhead: tokens that the question to a judge adds to its prompt; 0 without a judge.
    """

    samples: int
    min_cached_prefix: int
    overhead: int
    judge_overhead: int = 0

    @classmethod
    def of(
        cls,
        args: OmniOPDConfig,
        capabilities: Any,
        tokenizer: PreTrainedTokenizerBase | None,
        samples_per_request: int | None = None,
    ) -> "Requests":
        """The requests of a run.

        Args:
            args: configuration of the run.
            capabilities: capabilities of a teacher behind a service; `None` for any other teacher.
            tokenizer: the student's tokenizer; `None` estimates the length of an instruction from its letters.
            samples_per_request: samples per request; `None` for what the teacher is known to support.
        """
        samples, min_cached_prefix, overhead = args.num_rollouts, 0, 0
        if capabilities is not None:
            samples = capabilities.samples_per_request
            min_cached_prefix = capabilities.min_cached_prefix or 0
            if (args.teacher_continuation or capabilities.continuation) == "instruct":
                overhead = length_of(render_messages("", "So the"), tokenizer)
        judge_overhead = 0
        if args.signal != "rollouts":
            chunks = [Passage("", "", ("",) * (args.num_branches + 1))] * args.num_chunks
            judge_overhead = length_of(render_question("", chunks), tokenizer)
        samples = min(samples_per_request or samples, args.num_rollouts)
        return cls(samples, min_cached_prefix, overhead, judge_overhead)


def length_of(messages: Sequence[Mapping[str, str]], tokenizer: PreTrainedTokenizerBase | None) -> int:
    """Tokens of the texts of an instruction, as the student's tokenizer counts them, or estimated without one."""
    if tokenizer is None:
        return math.ceil(sum(len(message["content"]) for message in messages) / LETTERS_PER_TOKEN)
    return sum(len(tokenizer(text=message["content"], verbose=False)["input_ids"]) for message in messages)


def some_rows(dataset: Any, number: int) -> Any:
    """At most `number` rows: evenly spaced ones, or the first ones of a stream."""
    if not isinstance(dataset, Dataset):
        return dataset.take(number)
    total = len(dataset)
    return dataset if number >= total else dataset.select([i * total // number for i in range(number)])


def prompt_lengths(dataset: Any, tokenizer: PreTrainedTokenizerBase, args: OmniOPDConfig) -> list[float]:
    """Lengths of the prompts of a dataset in student tokens, with what only the teacher sees."""
    seen = args.teacher_context.rows(dataset)
    return [len(ids) for ids in prompt_ids(seen, tokenizer, args.chat_template_kwargs)]


def trajectory_length_of(args: OmniOPDConfig) -> tuple[float, str | None]:
    """Length of a trajectory in tokens, and the path of the checkpoint in whose logs it was measured.

    Without a checkpoint it is `max_completion_length`, the upper bound, and the path is `None`.
    """
    return _logged(args, "completions/mean_length") or (float(args.max_completion_length or 0), None)


def stopped_share_of(args: OmniOPDConfig) -> tuple[float, str]:
    """Share of the chunks that get no more than `first_rollouts`, and where it comes from, in words.

    It is logged by a run, or else follows from a probe, which asks for two rollouts of each fork. Without either it is
    0, the upper bound of the cost.
    """
    logged = _logged(args, "audit/frac_stopped") if args.first_rollouts else None
    if logged is not None:
        return logged[0], f"measured in {logged[1]}"
    path = Path(str(args.output_dir), PROBE_FOLDER, PROBE)
    try:
        duplicates = json.loads(path.read_text(encoding="utf-8"))["measured"]["duplicates"]
    except (OSError, ValueError, KeyError, TypeError):  # not probed, or no rollout came back
        duplicates = None
    if duplicates is None or not args.first_rollouts:
        return 0.0, "assumed: the upper bound of the cost"
    return least_stopped_share(duplicates, args.first_rollouts), f"measured in {path}"


def first_rollouts_row(args: OmniOPDConfig, share: float, source: str) -> tuple[str, str]:
    """The row of a plan or a forecast about `first_rollouts`."""
    return "first rollouts", f"{args.first_rollouts}, and no more for {share:.0%} of the chunks, {source}"


def branches_row(args: OmniOPDConfig) -> tuple[str, str]:
    """The row of a plan or a forecast about `num_branches`."""
    number = args.num_branches
    return "branches", f"the student writes {number} more at each fork; the teacher is asked where they differ"


def left_out(args: OmniOPDConfig) -> str:
    """What a forecast counts and a run may not ask for, by the settings that leave it out; empty without them."""
    reasons = {
        f"audit_trajectories={args.audit_trajectories!r} audits a part of the trajectories": (
            args.audit_trajectories != "all"
        ),
        f"min_anchor_entropy={args.min_anchor_entropy:g} leaves out chunks where the student is certain": (
            args.min_anchor_entropy > 0
        ),
        f"num_branches={args.num_branches} leaves out forks whose branches have one text": args.num_branches > 0,
    }
    return ", and ".join(reason for reason, is_set in reasons.items() if is_set)


def _logged(args: OmniOPDConfig, name: str) -> tuple[float, str] | None:
    """The mean of a metric in the newest checkpoint whose logs have it, and the checkpoint."""
    for checkpoint in checkpoints_of(str(args.output_dir)):
        history = (state_of(checkpoint) or {}).get("log_history", [])
        values = [entry[name] for entry in history if name in entry]
        if values:
            return sum(values) / len(values), str(checkpoint)
    return None


def num_steps(args: OmniOPDConfig, num_rows: int | None, num_processes: int, num_generations: int) -> int:
    """Optimizer steps of a run, as the trainer takes them: rows at the end of an epoch that fill no step are dropped.

    Args:
        args: configuration of the run.
        num_rows: rows of the dataset; `None` for a stream.
        num_processes: number of processes.
        num_generations: trajectories per prompt.

    Raises:
        ConfigError: for a stream without `max_steps`, or when the trajectories of a step do not fill whole groups.
        DataError: when the dataset does not fill a step.
    """
    sizes = (args.per_device_train_batch_size, args.gradient_accumulation_steps, num_processes, num_generations)
    if num_rows is not None:
        check_step_is_filled(num_rows, *sizes)
    if args.max_steps > 0:
        return args.max_steps
    if num_rows is None:
        raise ConfigError(
            f"max_steps={args.max_steps}: a streaming dataset has no length, so the number of steps must be given. "
            "Set `max_steps`."
        )
    return math.ceil(args.num_train_epochs * (num_rows // prompts_per_step(*sizes)))


def forecast_run(
    args: OmniOPDConfig,
    requests: Requests,
    price: Price | None,
    *,
    prompt_tokens: list[float],
    trajectory_length: float,
    trajectories_per_step: int,
    steps: int,
    num_rows: int | None,
    tokens_per_token: float = 1.0,
    **others: Any,
) -> Forecast:
    """The forecast of a run; see [`~omniopd_trl.accounting.forecast.forecast`] for what is not described here.

    Args:
        args: configuration of the run.
        requests: the requests to the teacher.
        price: price of the teacher.
        trajectories_per_step: trajectories of an optimizer step, over all processes.
        num_rows: rows of the dataset; `None` if unknown.
        **others: other arguments of `forecast`.

    Raises:
        ConfigError: when a number is out of range.
    """
    distinct = steps * trajectories_per_step // args.num_generations
    return forecast(
        prompt_tokens=prompt_tokens,
        trajectory_length=trajectory_length,
        num_chunks=args.num_chunks,
        chunk_length=args.chunk_length,
        min_chunk_length=args.min_chunk_length,
        num_rollouts=args.num_rollouts,
        samples_per_request=requests.samples,
        tokens_per_token=tokens_per_token,
        asked_per_token=max(TEACHER_TOKENS_PER_STUDENT_TOKEN, tokens_per_token),
        prompt_overhead=requests.overhead,
        price=price,
        min_cached_prefix=requests.min_cached_prefix,
        prompts_per_step=trajectories_per_step,
        steps=steps,
        num_prompts=distinct if num_rows is None else min(distinct, num_rows),
        judge_marks=0 if args.signal == "rollouts" else args.num_branches + 1,
        judge_overhead=requests.judge_overhead,
        first_rollouts=args.first_rollouts,
        **{
            "rollout_share": 0.0 if args.signal == "judge" else 1.0,
            "stopped_share": stopped_share_of(args)[0],
            **others,
        },
    )


def plan(
    args: OmniOPDConfig,
    state: TrainerState,
    *,
    student: str,
    teacher: Teacher,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Any,
    num_processes: int,
    recorded: tuple[int, int],
) -> str:
    """The plan of a run, as aligned lines.

    Args:
        args: configuration of the run.
        state: state of the trainer when training begins.
        student: name and size of the student.
        teacher: the teacher.
        tokenizer: the student's tokenizer.
        dataset: the training set.
        num_processes: number of processes.
        recorded: steps that are replayed from the journal, and their finished audits.
    """
    is_map_style = isinstance(dataset, Dataset)
    trajectories = args.per_device_train_batch_size * args.gradient_accumulation_steps * num_processes
    done = f" ({state.global_step:,} done)" if state.global_step else ""
    rows = [
        ("student", student),
        ("teacher", teacher.name),
        ("a step", f"{_per_step(args, trajectories)} x up to {args.num_chunks} {_places(args)} x {_per_chunk(args)}"),
        *([branches_row(args)] if args.num_branches else []),
        ("the run", f"{state.max_steps:,} steps{done}"),
    ]
    if isinstance(teacher, Export):  # which nobody asks
        return aligned(rows)
    length, checkpoint = trajectory_length_of(args)
    capabilities, budget = getattr(teacher, "capabilities", None), teacher.budget
    requests = Requests.of(args, capabilities, tokenizer)
    result = forecast_run(
        args,
        requests,
        None if budget is None else budget.price,
        prompt_tokens=prompt_lengths(some_rows(dataset, _MEASURED if is_map_style else _STREAMED), tokenizer, args),
        trajectory_length=length,
        trajectories_per_step=trajectories,
        steps=state.max_steps,
        num_rows=len(dataset) if is_map_style else None,
    )
    run = result.run
    most = "at most " if left_out(args) else ""
    tokens = f"{most}{run.prompt_tokens:,.0f} tokens read and {run.completion_tokens:,.0f} written by the teacher"
    source = "max_completion_length" if checkpoint is None else f"measured in {checkpoint}"
    rows.append(("forecast", f"{tokens}, with completions of {length:,.0f} tokens ({source})"))
    if teacher.is_remote and args.signal == "judge":
        rows.append(("requests", f"{most}{run.requests:,.0f}, for the marks of a trajectory each"))
    elif teacher.is_remote:
        samples = "1 sample" if requests.samples == 1 else f"{requests.samples} samples"
        samples = f"up to {samples}" if args.first_rollouts and requests.samples > 1 else samples
        rows.append(("requests", f"{most}{run.requests:,.0f}, for {samples} each"))
    if args.first_rollouts:
        rows.append(first_rollouts_row(args, *stopped_share_of(args)))
    if budget is not None and run.no_cache.usd is not None:
        limit = "" if budget.max_usd is None else f", and the budget is {budget.max_usd:,.2f}"
        paid = f"; {budget.usd_spent:,.2f} are spent" if budget.usd_spent else ""
        rows.append(("price", f"{most}{run.no_cache.usd:,.2f} dollars without a prompt cache{limit}{paid}"))
    if recorded[0]:
        steps, audits = recorded
        what = f"{steps:,} recorded {'step' if steps == 1 else 'steps'} with {audits:,} finished audits"
        rows.append(("replayed", f"{what}, which are not paid again"))
    return aligned(rows)


def _per_step(args: OmniOPDConfig, trajectories: int) -> str:
    prompts = f"{trajectories // args.num_generations:,} prompts"
    if args.num_generations > 1:
        prompts += f" x {args.num_generations} completions"
    if args.audit_trajectories == "all":
        return prompts
    return f"{prompts}, of which the {args.audit_trajectories} are audited,"


def _places(args: OmniOPDConfig) -> str:
    return "forks" if args.num_branches else "chunks"


def _per_chunk(args: OmniOPDConfig) -> str:
    rollouts = f"{args.num_rollouts} {'rollout' if args.num_rollouts == 1 else 'rollouts'}"
    if args.first_rollouts:
        rollouts = f"{args.first_rollouts} to {rollouts}"
    marks = "1 mark" if not args.num_branches else f"up to {args.num_branches + 1} marks"
    between = f"up to {rollouts} (forecast for marks that all are between the thresholds)"
    return {"rollouts": rollouts, "judge": marks, "cascade": f"{marks} and {between}"}[args.signal]


def print_plan(trainer: Any, recorded: tuple[int, int]) -> None:
    """Print the plan of a trainer's run. A plan that cannot be made is a warning.

    Args:
        trainer: the trainer, when training begins.
        recorded: see [`plan`].
    """
    from trl.trainer.utils import get_config_model_id

    try:
        student = get_config_model_id(trainer.model.config) or type(trainer.model).__name__
        if not trainer.objective.is_sharded:
            trained, size = (trainer.model.num_parameters(only_trainable=only) for only in (True, False))
            student += f", {size:,} parameters" + (f", {trained:,} of them trained" if trained < size else "")
        text = plan(
            trainer.args,
            trainer.state,
            student=student,
            teacher=trainer.teacher,
            tokenizer=trainer._tokenizer,
            dataset=trainer.train_dataset,
            num_processes=trainer.accelerator.num_processes,
            recorded=recorded,
        )
        print(text, flush=True)  # noqa: T201, before the progress bar and the lines of the steps
    except Exception as error:
        logger.warning(f"The plan of the run cannot be printed ({type(error).__name__}: {error}).")
