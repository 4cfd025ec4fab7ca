# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""pass@1 of the student and of the teacher, and the trainer's hooks for it."""

from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from torch.utils.data import SequentialSampler
from transformers import PreTrainedTokenizerBase, TrainerState
from transformers.utils import logging
from trl import DistillationTrainer
from trl.trainer.utils import repeat_iterable_dataset

from omniopd_trl.audits.auditor import TEACHER_TOKENS_PER_STUDENT_TOKEN
from omniopd_trl.data.checks import check_dataset
from omniopd_trl.errors import ConfigError, DataError
from omniopd_trl.evals.copying import copied_share
from omniopd_trl.evals.rewards import Rewards
from omniopd_trl.report.runs import text_of_prompt
from omniopd_trl.teachers import Prefix, SamplingRequest, TeacherReply, Usage
from omniopd_trl.teachers.base import replies_of
from omniopd_trl.trainer.distributed import together
from omniopd_trl.trainer.generation import EVALUATION_SEED
from omniopd_trl.trainer.metrics import metric_dtype, sum_over_processes
from omniopd_trl.trainer.omniopd_config import OmniOPDConfig
from omniopd_trl.trainer.trackers import unprofiled

logger = logging.get_logger(__name__)

Run = Callable[[Coroutine[Any, Any, Any]], Any]


class Logged:
    """What reward functions log themselves, through the arguments `log_metric` and `log_extra` of TRL.

    Attributes:
        metrics: values by name. The mean over all calls is a metric of the evaluation.
        extra: columns of the table of completions, one value per sample.
    """

    def __init__(self) -> None:
        self.metrics: dict[str, list[float]] = defaultdict(list)
        self.extra: dict[str, list[Any]] = defaultdict(list)

    def arguments(self) -> dict[str, Any]:
        """The two arguments."""
        return {
            "log_metric": lambda name, value: self.metrics[name].append(float(value)),
            "log_extra": lambda column, values: self.extra[column].extend(values),
        }


def decoded(batch: dict[str, torch.Tensor], tokenizer: PreTrainedTokenizerBase) -> tuple[list[list[int]], list[str]]:
    """Token ids and texts of the completions of a batch, without padding."""
    completion_ids = [
        ids[mask].tolist() for ids, mask in zip(batch["completion_ids"], batch["completion_mask"].bool(), strict=True)
    ]
    return completion_ids, tokenizer.batch_decode(completion_ids, skip_special_tokens=True)


def call_rewards(
    rewards: Rewards,
    inputs: list[dict[str, Any]],
    texts: list[str],
    completion_ids: list[list[int]],
    accelerator: Accelerator,
    state: TrainerState,
    run: Run,
) -> tuple[list[tuple[str, torch.Tensor]], Logged]:
    """Scores of this process's completions by each function, and what the functions log themselves.

    Every process has to call it at the same point.

    Args:
        rewards: the functions.
        inputs: dataset row of each completion.
        texts: the completions.
        completion_ids: their tokens.
        accelerator: accelerator of the run.
        state: trainer state, passed to the functions.
        run: function that runs a coroutine and returns its result.

    Raises:
        Exception: on every process, when a function of one raises an error, or does not return one score per sample.
    """
    logged = Logged()
    scores: list[tuple[str, torch.Tensor]] = []
    with together(accelerator.process_index):
        scores = list(rewards.score(inputs, texts, completion_ids, run=run, trainer_state=state, **logged.arguments()))
        for column, values in logged.extra.items():
            if len(values) != len(texts):
                raise ConfigError(
                    f"A reward function called log_extra({column!r}, ...) with {len(values)} values for {len(texts)} "
                    "samples. It must pass one per sample."
                )
    return scores, logged


def metrics_of(logged: Logged, accelerator: Accelerator) -> Iterator[tuple[str, float, int]]:
    """Name, sum and number of the values of each metric that a function logs itself, over all processes."""
    for name in sorted(set(gather_object([*logged.metrics]))):
        values = logged.metrics[name]
        total, count = sum_over_processes(accelerator, sum(values), len(values))
        yield name, total, int(count)


def rows_of(columns: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Columns of equal length as rows."""
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def repeated(dataset: Any, num_samples: int) -> Any:
    """The dataset with each example `num_samples` times in a row.

    The dataset is repeated and not the sampler, since accelerate computes from the length of the dataset how many
    samples of the last batch are padding.
    """
    if num_samples == 1:
        return dataset
    if isinstance(dataset, IterableDataset):
        return repeat_iterable_dataset(dataset, mini_repeat_count=num_samples)
    return dataset.select([row for row in range(len(dataset)) for _ in range(num_samples)])


@contextmanager
def uncast(args: OmniOPDConfig) -> Iterator[torch.dtype | None]:
    """Context without `bf16_full_eval` and `fp16_full_eval`, which yields the precision that they ask for.

    `Trainer` casts the student in place for them, and the run would then save the cast weights. It also leaves the
    student on the CPU until the first evaluation.
    """
    before = args.bf16_full_eval, args.fp16_full_eval
    args.bf16_full_eval = args.fp16_full_eval = False
    try:
        yield torch.float16 if before[1] else torch.bfloat16 if before[0] else None
    finally:
        args.bf16_full_eval, args.fp16_full_eval = before


class Evaluates(DistillationTrainer):
    """The hooks of [`OmniOPDTrainer`] for evaluation and prediction."""

    def _get_eval_sampler(self, eval_dataset):
        # TRL shuffles with the run's seed. Runs with other seeds would then draw other samples for a problem.
        return SequentialSampler(eval_dataset)

    def _get_dataloader(
        self, dataset, description, batch_size, sampler_fn=None, is_training=False, dataloader_key=None
    ):
        load, args = super()._get_dataloader, self.args
        if is_training:
            return load(dataset, description, batch_size, sampler_fn, is_training, dataloader_key)
        # Any set: the caller may pass one, or have replaced that of the constructor.
        name = "test_dataset" if description == "test" else "eval_dataset"
        check_dataset(dataset, name)
        if args.audit_eval:
            args.teacher_context.check(dataset, name)
        # All samples count, and a loader that is kept for its workers would be used for other sets as well.
        before = args.dataloader_drop_last, args.dataloader_persistent_workers
        args.dataloader_drop_last = args.dataloader_persistent_workers = False
        try:
            return load(repeated(dataset, args.num_eval_generations), description, batch_size, sampler_fn)
        finally:
            args.dataloader_drop_last, args.dataloader_persistent_workers = before

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        self._audit_table.show("eval", self.state.global_step, metric_key_prefix)
        return metrics

    def predict(self, test_dataset, ignore_keys=None, metric_key_prefix="test"):
        output = super().predict(test_dataset, ignore_keys, metric_key_prefix)
        self._audit_table.show("eval", self.state.global_step, metric_key_prefix)
        return output

    def _score_samples(self, inputs: list[dict[str, Any]], batch: dict[str, torch.Tensor]) -> None:
        """Add the scores of an evaluation batch to the metrics, and its samples to the table of completions."""
        rewards, accelerator, tokenizer = self._rewards, self.accelerator, self._tokenizer
        if not rewards:
            return
        device = accelerator.device
        completion_ids, texts = decoded(batch, tokenizer)
        scores, logged = call_rewards(
            rewards, inputs, texts, completion_ids, accelerator, self.state, self.step_audits.ask
        )
        for name, rewarded in scores:
            # Gathered per sample: `gather_for_metrics` drops the samples that pad the last batch of several processes.
            gathered = accelerator.gather_for_metrics(rewarded.to(device, metric_dtype(device)))
            scored = gathered[~gathered.isnan()]
            self.step_metrics.add_global("eval", name, scored.sum().item(), scored.numel())
        copied = [copied_share(text_of_prompt(row["prompt"]), text) for row, text in zip(inputs, texts, strict=True)]
        gathered = accelerator.gather_for_metrics(torch.tensor(copied, device=device))
        self.step_metrics.add_global("eval", "completions/copied_share", gathered.sum().item(), gathered.numel())
        for name, total, count in metrics_of(logged, accelerator):
            self.step_metrics.add_global("eval", name, total, count)
        if self.log_completions:
            columns = {
                "prompt": tokenizer.batch_decode(batch["prompt_ids"], skip_special_tokens=True),
                "completion": texts,
                **{name: rewarded.tolist() for name, rewarded in scores},
                **logged.extra,
            }
            self._eval_samples += accelerator.gather_for_metrics(rows_of(columns), use_gather_object=True)

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        """Evaluate or predict, and return the metrics of exactly these samples, under `metric_key_prefix`.

        TRL adds them when it logs: under `eval_` whatever the prefix, and only after `evaluate`. Those of a prediction
        or of an interrupted evaluation would count in the next evaluation.
        """
        if not self.is_in_train:
            # The base class sends the weights to vLLM once per step. Outside of training, they may change without a
            # step: a user loads others, or `load_best_model_at_end` does after the last evaluation.
            self._last_loaded_step = -1
        self.step_audits.start()
        self.step_metrics.discard("eval")
        self._eval_samples.clear()
        self._audit_table.discard("eval")
        self._eval_batch = 0
        try:
            with uncast(self.args) as dtype, unprofiled(self.args):
                # As `Trainer`: not for the evaluations during training.
                is_cast = dtype is not None and not self.is_in_train
                with torch.autocast(self.accelerator.device.type, dtype) if is_cast else nullcontext():
                    output = super().evaluation_loop(
                        dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
                    )
            metrics = self.step_metrics.take("eval")
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
            if self._eval_samples and self.accelerator.is_main_process:
                folder = Path(self.args.output_dir, "completions")
                path = folder / f"{metric_key_prefix}_{self.state.global_step:05d}.parquet"
                Dataset.from_list(self._eval_samples).to_parquet(path)
            return output
        finally:
            self.step_metrics.discard("eval")
            if not self.is_in_train:
                self.step_audits.cancel()  # nothing unless the evaluation was interrupted

    def evaluate_teacher(self) -> dict[str, float]:
        """Evaluate pass@1 of the teacher on the evaluation set, with `num_eval_generations` samples per problem.

        A sample that the teacher refuses is an empty one, which counts as wrong. Problems that it did not answer
        because requests failed are left out, with a warning.

        Returns:
            The scores by name, the same on all processes: `"pass@1"`, or `"pass@1/NAME"` of several functions.

        Raises:
            DataError: when there is nothing to score against.
        """
        rewards, dataset, args, accelerator = self._rewards, self.eval_dataset, self.args, self.accelerator
        if not isinstance(dataset, Dataset) or not rewards:
            raise DataError(
                "The teacher is evaluated on one map-style dataset with a `solution` or `answer` column, or with "
                f"`eval_reward_funcs`. Got {type(dataset).__name__}."
            )
        args.teacher_context.check(dataset, "eval_dataset")
        request = SamplingRequest(
            num_samples=args.num_eval_generations,
            max_tokens=int(TEACHER_TOKENS_PER_STUDENT_TOKEN * args.max_completion_length),
            temperature=args.teacher_temperature,
            top_p=args.teacher_top_p,
            seed=EVALUATION_SEED,
            ledger=self._recorder,
        )
        mine = range(accelerator.process_index, len(dataset), accelerator.num_processes)
        examples = [dataset[problem] for problem in mine]
        replies: list[TeacherReply] = []
        samples: list[tuple[str, float]] = []
        try:
            with self._recording(), together(accelerator.process_index):
                if examples:
                    prefixes = [Prefix(args.teacher_context.prompt(example), is_question=True) for example in examples]
                    replies = self.step_audits.ask(replies_of(self.teacher, prefixes, request))
                samples = self._score_replies(examples, replies)
        finally:
            if not self.is_in_train:
                self.step_audits.release()
        failures = [str(reply.failure) for reply in replies if reply.outcomes.get("failed_requests")]
        if (failures := gather_object(failures)) and accelerator.is_main_process:
            logger.warning(
                f"The teacher did not answer {len(failures)} of {len(dataset)} problems, which are not in "
                f"its scores. The first: {failures[0]}."
            )
        usage = sum((reply.usage for reply in replies), Usage())
        self.teacher_usage += sum(gather_object([usage]), Usage())
        scores: dict[str, list[float]] = defaultdict(list)
        for name, reward in gather_object(samples):
            if reward == reward:  # not NaN
                scores[name].append(reward)
        return {name: sum(values) / len(values) for name, values in scores.items()}

    def _score_replies(
        self, examples: Sequence[dict[str, Any]], replies: Sequence[TeacherReply]
    ) -> list[tuple[str, float]]:
        """Name and value of each score of the teacher's samples, and of each metric that a function logs."""
        pairs = []
        for example, reply in zip(examples, replies, strict=True):
            if not reply.outcomes.get("failed_requests"):
                texts = [rollout.text for rollout in reply.rollouts]
                pairs += [(example, text) for text in texts + [""] * (self.args.num_eval_generations - len(texts))]
        if not pairs:
            return []
        logged = Logged()
        inputs, texts = (list(column) for column in zip(*pairs, strict=True))
        scores = self._rewards.score(
            inputs, texts, run=self.step_audits.ask, trainer_state=self.state, **logged.arguments()
        )
        samples = [(name, value) for name, values in scores for value in values.tolist()]
        return samples + [(name, value) for name, values in logged.metrics.items() for value in values]
