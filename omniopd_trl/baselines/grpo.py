# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""GRPO on the rewards that evaluation reports."""

from collections.abc import Mapping
from typing import Any

from trl import GRPOConfig, GRPOTrainer

from omniopd_trl.baselines.base import Baseline
from omniopd_trl.errors import ConfigError
from omniopd_trl.evals.rewards import RewardFunc, Rewards, RewardSource
from omniopd_trl.trainer.omniopd_config import OmniOPDConfig


def rewards_of(funcs: list[RewardSource] | None, train_dataset: Any, args: OmniOPDConfig) -> list[RewardFunc]:
    """The reward functions of a run, checked with the columns of the training set.

    Raises:
        ConfigError: when there are none.
    """
    rewards = Rewards(
        funcs,
        train_dataset,
        device=args.device,
        lenient=args.eval_lenient_answers,
        trust_remote_code=args.trust_remote_code,
        chat_template_kwargs=args.chat_template_kwargs,
    )
    if not rewards:
        raise ConfigError(
            "method='grpo' needs a reward: the training set has neither a `solution` nor an `answer` column. Add one, "
            "or set `reward_funcs`."
        )
    return rewards.functions


def with_same_prompts(args: OmniOPDConfig, section: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with which a step has as many prompts as for the other methods, each with `num_generations` samples.

    TRL counts samples in `per_device_train_batch_size`. The number of micro-batches is multiplied, so a micro-batch
    needs the same memory.
    """
    if {"gradient_accumulation_steps", "steps_per_generation", "generation_batch_size"} & section.keys():
        return {}
    samples = section.get("num_generations", GRPOConfig.num_generations)
    return {"gradient_accumulation_steps": args.gradient_accumulation_steps * samples}


class GRPO(Baseline, GRPOTrainer):
    """TRL's [`~trl.GRPOTrainer`], evaluated as [`OmniOPDTrainer`]."""

    method = "grpo"
    config = GRPOConfig
    unlike = ("beta",)
