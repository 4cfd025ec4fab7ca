# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""What a run needs before a model is loaded: checked inputs, its journal, and its teacher."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from datasets import IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from omniopd_trl.accounting.usage import Ledger, Usage
from omniopd_trl.data.datasets import named_datasets
from omniopd_trl.errors import ConfigError, import_extra
from omniopd_trl.evals.rewards import Rewards, RewardSource
from omniopd_trl.journal.reader import merge, spent_by_journal
from omniopd_trl.journal.recorder import Recorder
from omniopd_trl.method import Similarity, WeightFunction, get_chunk_weights, get_similarity
from omniopd_trl.teachers import Teacher, TeacherOptions, load_teacher
from omniopd_trl.teachers.load import is_export, is_service
from omniopd_trl.trainer.distributed import on_every_process, together
from omniopd_trl.trainer.evaluation import repeated
from omniopd_trl.trainer.exported import Export, check_first_step, open_export
from omniopd_trl.trainer.hub import open_repo
from omniopd_trl.trainer.omniopd_config import OmniOPDConfig
from omniopd_trl.trainer.validation import check_inputs, check_own_weights, check_prompts
from omniopd_trl.trainer.verifier import training_rewards

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Prepared:
    """The inputs of a run after all checks that need no model.

    Attributes:
        teacher: the teacher, which has not been asked yet; an [`Export`] answers from an earlier run.
        recorder: recorder of the journal, and ledger of the teacher's requests.
        train_dataset: the training set, or that of an export. A stream is repeated into one endless epoch.
        datasets: the training set and the evaluation sets, each with its name in messages.
        processing_class: the student's tokenizer.
        similarity: similarity of a chunk and a rollout.
        rewards: functions that score evaluation samples.
        training_rewards: functions that score trajectories; `None` without a verifier, and for an export.
    """

    teacher: Teacher
    recorder: Recorder
    train_dataset: Any
    datasets: list[tuple[str, Any]]
    processing_class: PreTrainedTokenizerBase
    similarity: Similarity
    rewards: Rewards
    training_rewards: Rewards | None


def prepare(
    model: str | PreTrainedModel,
    teacher: str | PreTrainedModel | Teacher | None,
    args: OmniOPDConfig,
    train_dataset: Any,
    eval_dataset: Any,
    processing_class: PreTrainedTokenizerBase | None,
    *,
    step: Callable[[], int],
    quantization_config: Any = None,
    tools: Any = None,
    similarity: Similarity | None = None,
    chunk_weights: WeightFunction | None = None,
    eval_reward_funcs: RewardSource | list[RewardSource] | None = None,
    reward_funcs: RewardSource | list[RewardSource] | None = None,
) -> Prepared:
    """Check the arguments of [`OmniOPDTrainer`], and prepare what they name, from cheap to expensive.

    Every process has to call it at the same point. The teacher is loaded; no request is sent.

    Args:
        step: function that returns the current optimizer step. The other arguments are those of the trainer.

    Raises:
        ConfigError: when settings contradict each other, or do not fit the data, the student or the teacher.
        DataError: when the data or the model of a teacher cannot be used.
        HubError: with `push_to_hub`, when the run cannot be pushed.
        JournalError: when the journal of an earlier run cannot be read.
        MissingExtraError: when an optional dependency is not installed.
    """
    if args.n_gpu > 1:
        # transformers would wrap the student in DataParallel, whose replicas would all compute with the same weights.
        logger.warning(
            f"This process sees {args.n_gpu} GPUs, and does not divide batches among them. For that, start one "
            "process per GPU with `omniopd train` or `accelerate launch`."
        )
        args._n_gpu = 1
    if tools:
        raise ConfigError(f"tools={tools!r} were given, but tools are not supported yet. Leave them out.")
    teacher = teacher if teacher is not None else args.teacher_model_name_or_path
    export: Export | None = None
    if is_export(teacher):
        with together(args.process_index):
            export, train_dataset = open_export(teacher, args)
    processing_class = check_inputs(model, args, train_dataset, eval_dataset, processing_class, quantization_config)
    if export is not None:
        with together(args.process_index):
            check_first_step(export, processing_class, args)
    if isinstance(train_dataset, IterableDataset):
        # One endless epoch. transformers would restart the stream for each epoch, and a run that is resumed in a
        # later epoch would not find its position.
        train_dataset = train_dataset.repeat(None)
        if args.num_generations > 1:
            # Shuffled here and not by the base class, which would separate the trajectories of a group.
            train_dataset = train_dataset.shuffle(seed=args.seed) if args.shuffle_dataset else train_dataset
            train_dataset = repeated(train_dataset, args.num_generations)
    phi = get_similarity(similarity if similarity is not None else args.similarity)
    if chunk_weights is not None and args.num_branches:
        raise ConfigError(
            f"`chunk_weights` cannot be used with num_branches={args.num_branches}: the advantages of branches "
            "are the weights. Leave one of them out."
        )
    if chunk_weights is not None and args.posterior_baseline != "none":
        raise ConfigError(
            f"posterior_baseline={args.posterior_baseline!r} has no effect beside `chunk_weights`, which replaces it. "
            "Leave one of them out."
        )
    # Raise an error of `chunk_weights` before models are loaded.
    get_chunk_weights(args.posterior_baseline if chunk_weights is None else chunk_weights)
    rewards = Rewards.of(args, eval_reward_funcs, eval_dataset)
    if reward_funcs is not None and export is not None:
        raise ConfigError("`reward_funcs` has no effect with an export, which holds its rewards. Leave it out.")
    for_training: Rewards | None = None
    if export is None and (reward_funcs is not None or args.uses_rewards):
        if reward_funcs is not None and reward_funcs is eval_reward_funcs:
            reward_funcs = rewards.functions  # a reward model is loaded once
        needed_by = f"reward_weight={args.reward_weight:g}, audit_trajectories={args.audit_trajectories!r}"
        for_training = training_rewards(reward_funcs, train_dataset, args, needed_by)
    if args.push_to_hub:
        with together(args.process_index):
            if args.process_index == 0:
                open_repo(args)
    if teacher is None:
        raise ConfigError(
            "There is no teacher. Pass `teacher_model`, or set `teacher_model_name_or_path` in the configuration."
        )
    if args.use_vllm:
        import_extra("vllm", "vllm")
    check_own_weights(model, teacher)
    recorder = Recorder(step)
    paid = spent_before(teacher, args)
    datasets = list(named_datasets(train_dataset, eval_dataset))
    with together(args.process_index):  # a key may be missing on one machine only
        loaded = export or prepare_teacher(teacher, args, recorder, paid)
        check_prompts(loaded, datasets, args.teacher_context, signal=args.signal)
    return Prepared(loaded, recorder, train_dataset, datasets, processing_class, phi, rewards, for_training)


def spent_before(teacher: str | PreTrainedModel | Teacher, args: OmniOPDConfig) -> tuple[Usage, float] | None:
    """What all processes of earlier runs have paid, also when machines share no folder.

    Every process has to call it at the same point.

    Returns:
        Tokens and US dollars; `None` when the teacher is not a service. Journals of an earlier run may be missing,
        on a machine that takes no part: a warning says so.

    Raises:
        JournalError: on every process, when the journal of one cannot be read.
    """
    if not is_service(teacher):
        return None
    paid = merge(on_every_process(lambda: spent_by_journal(args.output_dir), args.process_index))
    expected = max((one.num_processes for one in paid), default=0)
    missing = sorted(set(range(expected)) - {one.rank for one in paid})
    if missing and args.process_index == 0:
        logger.warning(
            f"An earlier run of {expected} processes has written to output_dir={str(args.output_dir)!r}, and the "
            f"journals of processes {', '.join(map(str, missing))} are not there: what these paid is not counted in a "
            "budget. Put `output_dir` on a file system that all machines share, or copy `_audits` from the other "
            "machines."
        )
    return sum((one.usage for one in paid), Usage()), sum(one.usd for one in paid)


def prepare_teacher(
    teacher: str | PreTrainedModel | Teacher,
    args: OmniOPDConfig,
    ledger: Ledger,
    paid: tuple[Usage, float] | None = None,
) -> Teacher:
    """Load the teacher of a run. Sends no request.

    Args:
        teacher: a name, a model or a teacher.
        args: the configuration; `omniopd_trl/teachers/options.py` lists the options that each kind of teacher reads.
        ledger: ledger of the requests, paid and in flight.
        paid: what earlier runs have paid, from [`spent_before`].

    Raises:
        ConfigError: when an option has no effect with this teacher.
        DataError: when a model cannot be loaded.
    """
    prepared = load_teacher(teacher, TeacherOptions.of(args), paid)
    if prepared.budget is not None:
        prepared.budget.ledger = ledger
    return prepared
