# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Scores of samples by reward functions, called with TRL's arguments."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from trl.data_utils import is_conversational
from trl.trainer.utils import get_callable_name

from omniopd_trl.data.datasets import column_names, named_datasets
from omniopd_trl.errors import ConfigError, import_extra
from omniopd_trl.evals.math import math_accuracy

RewardFunc = Callable[..., list[float | None]]


def reward_funcs_of(funcs: RewardFunc | list[RewardFunc] | None, eval_dataset: Any) -> list[RewardFunc]:
    """The functions that score evaluation samples. Empty if the dataset has no answers.

    Raises:
        MissingExtraError: when math-verify is needed and not installed.
    """
    if funcs is not None:
        return list(funcs) if isinstance(funcs, (list, tuple)) else [funcs]
    for _, dataset in named_datasets(None, eval_dataset):
        if {"solution", "answer"} & set(column_names(dataset)):
            import_extra("math_verify", "eval")
            return [math_accuracy]
    return []


def score(
    funcs: list[RewardFunc],
    examples: list[dict[str, Any]],
    texts: list[str],
    completion_ids: list[list[int]] | None = None,
    **kwargs: Any,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Scores of samples by each reward function.

    Args:
        funcs: reward functions in the signature of TRL's `reward_funcs`.
        examples: the dataset row of each sample.
        texts: the completions.
        completion_ids: token ids of the completions. `None` for completions of a teacher.
        **kwargs: passed to the functions.

    Returns:
        For each function, the metric's name and `(N,)` scores, float64. NaN if the function declines to score.

    Raises:
        ConfigError: when a function does not return one score for each sample.
    """
    completions: list[Any] = texts
    if is_conversational(examples[0]):
        completions = [[{"role": "assistant", "content": text}] for text in texts]
    columns = {key: [example[key] for example in examples] for key in examples[0] if key != "prompt"}
    for func in funcs:
        rewards = func(
            prompts=[example["prompt"] for example in examples],
            completions=completions,
            completion_ids=completion_ids,
            **kwargs,
            **columns,
        )
        if len(rewards) != len(examples):
            raise ConfigError(
                f"The reward function {get_callable_name(func)} returned {len(rewards)} scores for {len(examples)} "
                "samples. It must return one per sample, or None where it declines to score."
            )
        name = "pass@1" if len(funcs) == 1 else f"pass@1/{get_callable_name(func)}"
        yield name, torch.tensor([float("nan") if r is None else float(r) for r in rewards], dtype=torch.float64)
