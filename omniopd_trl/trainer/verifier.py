# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""A verifier beside the teacher: reward functions score the trajectories of a step. Not in the paper."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainerState

from omniopd_trl.audits.types import Verified
from omniopd_trl.errors import ConfigError
from omniopd_trl.evals.rewards import RewardFunc, Rewards, RewardSource
from omniopd_trl.method.rewards import (
    chosen_for_audits,
    group_advantages,
    is_right,
    share_of_equal_groups,
    total_reward,
)
from omniopd_trl.trainer.evaluation import Run, call_rewards, decoded, metrics_of, rows_of
from omniopd_trl.trainer.metrics import Metrics, metric_dtype
from omniopd_trl.trainer.omniopd_config import OmniOPDConfig


def training_rewards(
    funcs: RewardSource | Sequence[RewardSource] | None, train_dataset: Any, args: OmniOPDConfig, needed_by: str
) -> Rewards:
    """The reward functions of a training, checked with the columns of the training set.

    Args:
        funcs: as for [`Rewards`]. `None` for the function that reads the columns of the training set.
        train_dataset: the training set.
        args: configuration of the run.
        needed_by: the setting that needs rewards, for the message.

    Raises:
        ConfigError: when there are none, or one cannot be used.
    """
    rewards = Rewards.of(args, funcs, train_dataset, option="reward_funcs")
    if not rewards or rewards.reads_nothing:
        what = "neither a `solution` nor an `answer` column" + " that math-verify can read" * bool(rewards)
        raise ConfigError(f"{needed_by} needs a reward: the training set has {what}. Add one, or set `reward_funcs`.")
    return rewards


class Verifier:
    """Scores the trajectories of a step, and says what follows for the loss and for the audits.

    Args:
        rewards: reward functions; `None` if the scores of all trajectories are recorded, as in an export.
        accelerator: accelerator of the run.
        args: configuration of the run.
        tokenizer: the student's tokenizer.
        metrics: metrics of the run.

    Raises:
        ConfigError: when `reward_weights` does not fit the functions.
    """

    def __init__(
        self,
        rewards: Rewards | None,
        accelerator: Accelerator,
        args: OmniOPDConfig,
        tokenizer: PreTrainedTokenizerBase,
        metrics: Metrics,
    ):
        self._rewards = rewards
        self._accelerator = accelerator
        self._args = args
        self._tokenizer = tokenizer
        self._metrics = metrics
        self._table: list[dict[str, Any]] = []  # of the last step, with `log_completions`
        if rewards is not None:
            args.reward_weights_of(rewards.function_names)

    @property
    def functions(self) -> list[RewardFunc]:
        """The reward functions, those of reward models included; empty if the scores are recorded."""
        return [] if self._rewards is None else self._rewards.functions

    def verify(
        self,
        inputs: list[dict[str, Any]],
        batch: dict[str, torch.Tensor],
        known: list[Verified] | None,
        state: TrainerState,
        run: Run,
    ) -> list[Verified]:
        """Score the trajectories of a generation batch. Every process has to call it at the same point.

        A group may be spread over processes: its trajectories follow each other in the order of the processes.

        Args:
            inputs: dataset row of each of this process's B trajectories.
            batch: the batch of TRL.
            known: recorded scores; the functions are not called again. `None` if there are none.
            state: trainer state, passed to the functions.
            run: function that runs a coroutine and returns its result.

        Raises:
            Exception: on every process, as [`~omniopd_trl.trainer.evaluation.call_rewards`].
        """
        args, accelerator = self._args, self._accelerator
        completion_ids, texts = decoded(batch, self._tokenizer)
        extra: dict[str, list[Any]] = {}
        if known and self._rewards is not None and [*known[0].rewards] != self._rewards.function_names:
            known = None  # of functions whose scores were logged only
        if known is not None:
            names = list(known[0].rewards)
            rows = [[math.nan if score is None else score for score in one.rewards.values()] for one in known]
            scores = torch.tensor(rows, dtype=torch.float64)
        else:
            assert self._rewards is not None
            names = self._rewards.function_names
            scored, logged = call_rewards(self._rewards, inputs, texts, completion_ids, accelerator, state, run)
            scores, extra = torch.stack([values for _, values in scored], dim=1), logged.extra
            for name, total, count in metrics_of(logged, accelerator):
                self._metrics.add_global("train", name, total, count)
        everywhere = accelerator.gather(scores.to(accelerator.device, metric_dtype(accelerator.device))).cpu().double()
        weights, size = torch.tensor(args.reward_weights_of(names), dtype=torch.float64), args.num_generations
        reward = total_reward(everywhere, weights)
        advantages = group_advantages(reward, size)
        chosen = chosen_for_audits(reward, is_right(everywhere, weights), size, args.audit_trajectories)
        self._metrics.add_rewards(names, everywhere, reward, share_of_equal_groups(reward, size))
        self._metrics.add_global("train", "audit/chosen_trajectories", chosen.sum().item(), len(chosen))
        first = accelerator.process_index * len(inputs)
        verified = [
            Verified(
                {name: _known(score) for name, score in zip(names, scores[b].tolist(), strict=True)},
                _known(reward[first + b].item()),
                advantages[first + b].item(),
                bool(chosen[first + b]),
            )
            for b in range(len(inputs))
        ]
        if args.log_completions:
            prompts = self._tokenizer.batch_decode(batch["prompt_ids"], skip_special_tokens=True)
            columns = {"prompt": prompts, "completion": texts, **dict(zip(names, scores.T.tolist(), strict=True))}
            columns |= {"advantage": [one.advantage for one in verified], **extra}
            self._table = gather_object(rows_of(columns))
        return verified

    def show(self, step: int) -> None:
        """Write the table of the last step to `completions/`, on the main process."""
        if self._table and self._accelerator.is_main_process:
            path = Path(self._args.output_dir, "completions", f"rewards_{step:05d}.parquet")
            Dataset.from_list(self._table).to_parquet(path)
        self._table = []


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
