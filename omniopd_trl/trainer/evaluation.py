# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""pass@1 of the student and of the teacher."""

from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainerState

from omniopd_trl.accounting.usage import Ledger
from omniopd_trl.audits.auditor import TEACHER_TOKENS_PER_STUDENT_TOKEN
from omniopd_trl.errors import DataError
from omniopd_trl.evals.rewards import RewardFunc, score
from omniopd_trl.teachers import Prefix, SamplingRequest, Teacher, TeacherReply, Usage
from omniopd_trl.teachers.base import replies_of
from omniopd_trl.trainer.distributed import raise_together
from omniopd_trl.trainer.metrics import metric_dtype
from omniopd_trl.trainer.omniopd_config import OmniOPDConfig


def student_scores(
    funcs: list[RewardFunc],
    inputs: list[dict[str, Any]],
    batch: dict[str, torch.Tensor],
    tokenizer: PreTrainedTokenizerBase,
    accelerator: Accelerator,
    state: TrainerState,
) -> Iterator[tuple[str, float, int]]:
    """Scores of an evaluation batch, over all processes.

    Args:
        funcs: functions that score samples; without any, nothing is returned.
        inputs: dataset row of each sample.
        batch: batch with `completion_ids` and `completion_mask`, `(B, T)`.
        tokenizer: the student's tokenizer.
        accelerator: accelerator of the run.
        state: trainer state, passed to the functions.

    Returns:
        For each function, the name of the metric, the sum of the scores and their number.
    """
    if not funcs:
        return
    completion_ids = [
        ids[mask].tolist() for ids, mask in zip(batch["completion_ids"], batch["completion_mask"].bool(), strict=True)
    ]
    texts = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
    for name, rewards in score(funcs, inputs, texts, completion_ids, trainer_state=state):
        # Gathered per sample: `gather_for_metrics` drops the samples that pad the last batch of several processes.
        gathered = accelerator.gather_for_metrics(rewards.to(accelerator.device, metric_dtype(accelerator.device)))
        scored = gathered[~gathered.isnan()]
        yield name, scored.sum().item(), scored.numel()


def teacher_scores(
    funcs: list[RewardFunc],
    dataset: Any,
    teacher: Teacher,
    ask: Callable[[Coroutine[Any, Any, list[TeacherReply]]], list[TeacherReply]],
    ledger: Ledger,
    accelerator: Accelerator,
    args: OmniOPDConfig,
    state: TrainerState,
) -> tuple[dict[str, float], Usage]:
    """Scores of the teacher's samples, `num_eval_generations` per problem.

    Args:
        funcs: functions that score samples.
        dataset: evaluation set with each problem `num_eval_generations` times in a row.
        teacher: the teacher to evaluate.
        ask: function that runs a coroutine of the teacher and returns its result.
        ledger: ledger where the teacher's requests are counted.
        accelerator: accelerator of the run.
        args: configuration of the run.
        state: trainer state, passed to the functions.

    Returns:
        The mean scores by name and the tokens used, both over all processes.

    Raises:
        DataError: when there is nothing to score against.
    """
    if not isinstance(dataset, Dataset) or not funcs:
        raise DataError(
            "The teacher is evaluated on one map-style dataset with a `solution` or `answer` column, or with "
            f"`eval_reward_funcs`. Got {type(dataset).__name__}."
        )
    repeats = args.num_eval_generations
    request = SamplingRequest(
        num_samples=repeats,
        max_tokens=int(TEACHER_TOKENS_PER_STUDENT_TOKEN * args.max_completion_length),
        temperature=args.teacher_temperature,
        top_p=args.teacher_top_p,
        seed=args.seed,
        ledger=ledger,
    )
    samples: list[tuple[str, float]] = []
    replies: list[TeacherReply] = []
    error: Exception | None = None
    mine = range(accelerator.process_index, len(dataset) // repeats, accelerator.num_processes)
    examples = [dataset[problem * repeats] for problem in mine]
    if examples:
        try:
            replies = ask(replies_of(teacher, [Prefix(example["prompt"]) for example in examples], request))
        except Exception as caught:
            error = caught
    raise_together(error, accelerator.process_index)
    pairs = [(e, r.text) for e, reply in zip(examples, replies, strict=True) for r in reply.rollouts]
    if pairs:
        inputs, texts = (list(column) for column in zip(*pairs, strict=True))
        for name, rewards in score(funcs, inputs, texts, trainer_state=state):
            samples.extend((name, reward) for reward in rewards.tolist())
    usage = sum((reply.usage for reply in replies), Usage())
    scores: dict[str, list[float]] = defaultdict(list)
    for name, reward in gather_object(samples):
        if reward == reward:  # not NaN
            scores[name].append(reward)
    means = {name: sum(values) / len(values) for name, values in scores.items()}
    return means, sum(gather_object([usage]), Usage())


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
