# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""GRPO on the rewards that evaluation reports."""

import math
from collections.abc import Mapping
from typing import Any

from trl import GRPOConfig, GRPOTrainer

from omniopd_trl.baselines.base import Baseline
from omniopd_trl.trainer.omniopd_config import OmniOPDConfig


def with_same_prompts(args: OmniOPDConfig, section: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with which a step has as many prompts as for the other methods, each with `num_generations` samples.

    TRL counts samples in `per_device_train_batch_size`. The number of micro-batches is multiplied, so a micro-batch
    needs the same memory. A recipe that sets `num_generations` above 1 sets it for GRPO as well.
    """
    own = args.num_generations
    samples = section.get("num_generations", own if own > 1 else GRPOConfig.num_generations)
    if {"gradient_accumulation_steps", "steps_per_generation", "generation_batch_size"} & section.keys():
        return {"num_generations": samples}
    steps = math.ceil(args.gradient_accumulation_steps * samples / own)
    return {"num_generations": samples, "gradient_accumulation_steps": steps}


class GRPO(Baseline, GRPOTrainer):
    """TRL's [`~trl.GRPOTrainer`], evaluated as [`OmniOPDTrainer`]."""

    method = "grpo"
    config = GRPOConfig
    unlike = ("beta",)
