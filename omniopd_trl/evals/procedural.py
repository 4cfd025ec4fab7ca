# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Reward function for the tasks of `reasoning_gym`, in TRL's signature: the task itself scores the answer."""

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from omniopd_trl.data.benchmarks import make_gym_dataset
from omniopd_trl.evals.math import text_of_completion


def reasoning_gym_accuracy(
    completions: Sequence[str | list[dict[str, Any]]],
    gym: Sequence[str | None],
    *,
    partial: bool = False,
    **kwargs: Any,
) -> list[float | None]:
    """Score completions with the verifier of their task.

    The answer is the text after the last `Answer:`, or else the whole completion.

    Args:
        completions: plain texts, or conversational completions, of which the last message is scored.
        gym: the dataset's column that names the problem, as [`~omniopd_trl.data.load_benchmark`] writes it.
        partial: whether a task's score between 0 and 1 counts. Otherwise only a full score is right.
        **kwargs: other columns that TRL passes. Not used.

    Returns:
        1.0 or 0.0 per completion, or with `partial` the task's score; `None` where a row names no problem.

    Raises:
        MissingExtraError: when `reasoning_gym` is not installed.
    """
    scores: list[float | None] = []
    for completion, named in zip(completions, gym, strict=True):
        if named is None:
            scores.append(None)
            continue
        dataset, problem = _problem(named)
        answer = text_of_completion(completion).rpartition("Answer:")[2].strip(" \n*$")
        score = float(dataset.score_answer(answer, problem))
        scores.append(score if partial else float(score == 1.0))
    return scores


@lru_cache(maxsize=64)
def _dataset(task: str, options: str) -> Any:
    return make_gym_dataset(task, json.loads(options))


# The same problems are scored at every evaluation and for every sample of a prompt. A problem is drawn again rather
# than stored: what its verifier needs is not always JSON.
@lru_cache(maxsize=65536)
def _problem(named: str) -> tuple[Any, Any]:
    problem = json.loads(named)
    dataset = _dataset(problem["task"], json.dumps(problem["options"]))
    return dataset, dataset[problem["index"]]
