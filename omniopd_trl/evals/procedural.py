# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Reward function for the tasks of `reasoning_gym`, in TRL's signature: the task itself scores the answer."""

import json
import os
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

from omniopd_trl.data.benchmarks import make_gym_dataset
from omniopd_trl.errors import ConfigError, find_extra
from omniopd_trl.evals.math import text_of_completion
from omniopd_trl.evals.sandbox import Limits, Sandbox, SandboxError, make_sandbox

# Tasks whose verifiers evaluate the answer as Python or with sympy, or hold an exponent or a count of any size: an
# answer may run any program, or take any time and memory.
EVALUATED = frozenset(
    {
        *("binary_matrix", "composite", "countdown", "intermediate_integration", "n_queens", "rubiks_cube"),
        *("polynomial_multiplication", "rush_hour", "simple_integration", "spiral_matrix", "string_insertion"),
    }
)

# Tasks whose verifiers give the full score to answers that are wrong. A student in training finds them.
UNSOUND = {
    "coin_flip": "the first digits of the probability are right, such as 0 for 0.25",
    "complex_arithmetic": "nan is right",
    "game_of_life_halting": "every answer is right",
    "puzzle24": "any four numbers that make 24 are right",
}

# An answer that takes longer ends its process, and is wrong. A run of 32 answers keeps within the limits.
_SECONDS = 3
_ANSWERS = 32
_LIMITS = Limits(cpu_seconds=120, wall_seconds=300, memory_mib=2048)

# The kernel ends the process after the time of an answer: inside of an evaluation, no exception would.
_VERIFIER = f"""\
import json, os, signal, sys
out = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
os.environ["OPENBLAS_NUM_THREADS"] = "1"
import reasoning_gym
task, options, answers = json.loads(sys.stdin.readline())
dataset = reasoning_gym.create_dataset(task, **options)
print("ready", file=out, flush=True)
for answer, index in answers:
    problem = dataset[index]
    signal.setitimer(signal.ITIMER_REAL, {_SECONDS})
    try:
        score = float(dataset.score_answer(answer, problem))
    except Exception:
        score = 0.0
    signal.setitimer(signal.ITIMER_REAL, 0)
    print(score, file=out, flush=True)
"""


def reasoning_gym_accuracy(
    completions: Sequence[str | list[dict[str, Any]]],
    gym: Sequence[str | None],
    *,
    partial: bool = False,
    **kwargs: Any,
) -> list[float | None]:
    """Score completions with the verifier of their task.

    The answer is the text after the last `Answer:`, or else the whole completion. The verifiers of some tasks evaluate
    it: they run in the sandbox that [`make_sandbox`] makes of the environment variable `OMNIOPD_SANDBOX`, `"auto"` by
    default. An answer that raises an error, or takes more than 3 seconds there, is wrong.

    Args:
        completions: plain texts, or conversational completions, of which the last message is scored.
        gym: the dataset's column that names the problem, as [`~omniopd_trl.data.load_benchmark`] writes it.
        partial: whether a task's score between 0 and 1 counts. Otherwise only a full score is right.
        **kwargs: other columns that TRL passes. Not used.

    Returns:
        1.0 or 0.0 per completion, or with `partial` the task's score; `None` where a row names no problem.

    Raises:
        MissingExtraError, ConfigError, SandboxError: as [`check_tasks`].
    """
    check_tasks(gym)
    scores: list[float | None] = [None] * len(completions)
    evaluated: dict[tuple[str, str], list[tuple[int, str, int]]] = defaultdict(list)
    for place, (completion, named) in enumerate(zip(completions, gym, strict=True)):
        if named is None:
            continue
        answer = text_of_completion(completion).rpartition("Answer:")[2].strip(" \n*$")
        problem = json.loads(named)
        if problem["task"] in EVALUATED:
            evaluated[problem["task"], json.dumps(problem["options"])].append((place, answer, problem["index"]))
            continue
        dataset, entry = _problem(named)
        try:
            scores[place] = float(dataset.score_answer(answer, entry))
        except Exception:  # the text of a model may be anything
            scores[place] = 0.0
    for (task, options), answers in evaluated.items():
        pairs = [*dict.fromkeys((answer, index) for _, answer, index in answers)]
        found = dict(zip(pairs, _verified(task, json.loads(options), pairs), strict=True))
        for place, answer, index in answers:
            scores[place] = found[answer, index]
    return [score if score is None or partial else float(score == 1.0) for score in scores]


def check_tasks(gym: Iterable[str | None]) -> None:
    """Refuse problems that cannot be scored.

    Args:
        gym: the column that names the problems.

    Raises:
        MissingExtraError: when `reasoning_gym` is not installed.
        ConfigError: when a verifier gives wrong answers the full score.
        ConfigError, SandboxError: when a verifier needs a sandbox, and there is none that works.
    """
    find_extra("reasoning_gym", "gym")
    tasks = {json.loads(named)["task"] for named in gym if named is not None}
    for task in sorted(tasks & UNSOUND.keys()):
        raise ConfigError(
            f"The verifier of reasoning_gym's task {task!r} gives wrong answers the full score ({UNSOUND[task]}), so "
            "nothing can be measured with it. Choose another task, or a function of your own as `reward_funcs`."
        )
    if tasks & EVALUATED:
        verifier_sandbox()


def verifier_sandbox() -> Sandbox:
    """The sandbox of the verifiers that evaluate answers, with the packages of this environment.

    Raises:
        ConfigError, SandboxError: when there is none that works.
    """
    return make_sandbox(os.environ.get("OMNIOPD_SANDBOX") or "auto", _LIMITS, sys.executable)


def _verified(task: str, options: dict[str, Any], pairs: Sequence[tuple[str, int]]) -> list[float]:
    """The scores of pairs of an answer and the index of its problem.

    Raises:
        ConfigError, SandboxError: when there is no sandbox that works, or it has no `reasoning_gym`.
    """
    sandbox = verifier_sandbox()
    scores: list[float] = []
    while len(scores) < len(pairs):
        part = pairs[len(scores) : len(scores) + _ANSWERS]
        outcome = sandbox.run(_VERIFIER, json.dumps([task, options, part]) + "\n")
        ready, *lines = outcome.stdout.splitlines() or [""]
        if ready != "ready":
            reason = " ".join(outcome.stderr.split())[-300:] or "it wrote nothing"
            raise SandboxError(
                f"The sandbox does not run the verifier of {task!r} ({outcome.status}: "
                f"{reason}). A sandbox elsewhere needs reasoning_gym: set OMNIOPD_SANDBOX to 'auto' "
                "to use this machine."
            )
        # The next answer ended its process.
        scores += [*map(_number, lines), 0.0][: len(part)]
    return scores


def _number(line: str) -> float:
    """A score. An answer that is evaluated may write anything."""
    try:
        score = float(line)
    except ValueError:
        return 0.0
    return score if 0 <= score <= 1 else 0.0


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
