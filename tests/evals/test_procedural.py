# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Problems of reasoning_gym are scored by their own verifiers."""

import asyncio
import inspect
import json
import re

import pytest
import reasoning_gym
from reasoning_gym.factory import DATASETS

from omniopd_trl.data import load_benchmark
from omniopd_trl.data.benchmarks import load_benchmark_splits
from omniopd_trl.errors import ConfigError
from omniopd_trl.evals.math import math_accuracy
from omniopd_trl.evals.procedural import EVALUATED, UNSOUND, reasoning_gym_accuracy, verifier_sandbox
from omniopd_trl.evals.rewards import Rewards
from omniopd_trl.evals.sandbox import SandboxError


@pytest.fixture(scope="module")
def box():
    try:
        return verifier_sandbox()
    except SandboxError as error:
        pytest.skip(str(error))


# A number; a list of words in any order of equal ones; a puzzle with many right answers, whose verifier needs what is
# not JSON.
@pytest.mark.parametrize("task", ["chain_sum", "word_sorting", "zebra_puzzles", "countdown", "n_queens"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_scores(task, split, box):
    """The problem that is scored is the one in the dataset: its own answer is right, that of another is not."""
    rows = load_benchmark(f"reasoning_gym:{task}?size=4", split)
    right = [f"I think so.\nAnswer: {answer}" for answer in rows["answer"]]
    assert reasoning_gym_accuracy(right, rows["gym"]) == [1.0] * len(rows)
    assert reasoning_gym_accuracy(["Answer: nonsense", ""], rows["gym"][:2]) == [0.0, 0.0]
    assert reasoning_gym_accuracy(["x"], [None]) == [None]


def test_equals_the_package(box):
    """Scores are those of the package on the same problems, partial ones if asked."""
    options = {"size": 20, "seed": 10**9}
    reference = reasoning_gym.create_dataset("countdown", **options)
    rows = load_benchmark("reasoning_gym:countdown?size=20")
    answers = [row["answer"] if i % 3 else f"{i} + 1" for i, row in enumerate(rows)]
    expected = [reference.score_answer(answer, problem) for answer, problem in zip(answers, reference, strict=True)]
    assert reasoning_gym_accuracy([f"Answer: {a}" for a in answers], rows["gym"], partial=True) == expected
    assert 0 < min(expected) < max(expected) == 1
    assert reasoning_gym_accuracy(answers, rows["gym"]) == [float(score == 1) for score in expected]


def test_as_the_default_of_an_evaluation():
    """A procedural set is scored by its task, and its metric is `pass@1`."""
    dataset = load_benchmark("reasoning_gym:chain_sum?size=2")
    rewards = Rewards(None, dataset, device="cpu")
    completions = [f"Answer: {dataset[0]['answer']}", "Answer: none"]
    ((name, scores),) = rewards.score(list(dataset), completions, run=asyncio.run)
    assert (name, scores.tolist()) == ("pass@1", [1.0, 0.0])


def test_hostile_answers(box, tmp_path):
    """An answer that a verifier evaluates can neither act on this machine nor stop the run, and counts as wrong."""
    row = load_benchmark("reasoning_gym:countdown?size=1")[0]
    trace = tmp_path / "trace"
    hostile = ["9**9**9**9", f"open({str(trace)!r}, 'w')", "(" * 5000, "exit()", "print(1.0)"]
    answers = [f"Answer: {answer}" for answer in [*hostile, row["answer"]]]
    assert reasoning_gym_accuracy(answers, [row["gym"]] * len(answers)) == [0.0] * len(hostile) + [1.0]
    assert not trace.exists()


def test_tasks_that_evaluate_answers():
    """Every task whose verifier evaluates, sums a power, counts as far as an answer says or holds other tasks is in
    the list."""
    evaluates = re.compile(
        r"\beval\(answer|parse_expr\(answer|sympify\(answer|Fraction\(answer|self\.datasets\b"
        r"|\] \* int\(|perform_moves\(answer"
    )
    # Its `parse_expr` is a parser of its own.
    found = {
        name
        for name, (task, _) in DATASETS.items()
        if name != "propositional_logic" and evaluates.search(inspect.getsource(inspect.getmodule(task)))
    }
    assert found - UNSOUND.keys() == EVALUATED


@pytest.mark.parametrize(("task", "answer"), [("rubiks_cube", "R999999999999"), ("rush_hour", "A+999999999999")])
def test_hostile_counts(task, answer, box):
    """An answer that takes any time and memory in its verifier is wrong after some seconds."""
    row = load_benchmark(f"reasoning_gym:{task}?size=1")[0]
    assert reasoning_gym_accuracy([f"Answer: {answer}"], [row["gym"]]) == [0.0]


@pytest.mark.parametrize(
    ("task", "wrong"),
    [("coin_flip", "0"), ("complex_arithmetic", "nan"), ("game_of_life_halting", "?"), ("puzzle24", "6*4*1*1")],
)
def test_unsound_verifiers(task, wrong):
    """The package gives the full score to a wrong answer. Such a task is refused before anything is generated."""
    assert task in UNSOUND
    problems = list(reference := reasoning_gym.create_dataset(task, size=4, seed=10**9))
    assert any(problem["answer"] != wrong and reference.score_answer(wrong, problem) == 1 for problem in problems)
    dataset = load_benchmark(f"reasoning_gym:{task}?size=4")
    for reward_funcs in (None, reasoning_gym_accuracy):
        with pytest.raises(ConfigError, match=f"task '{task}' gives wrong answers the full score"):
            Rewards(reward_funcs, dataset, device="cpu")
    with pytest.raises(ConfigError, match="Choose another task"):
        reasoning_gym_accuracy(["Answer: 1"], dataset["gym"][:1])


def test_every_row_is_checked(monkeypatch):
    """A set of several tasks needs a sandbox if one of them does."""
    monkeypatch.setenv("OMNIOPD_SANDBOX", "docker")
    joined = load_benchmark_splits("reasoning_gym:gcd?size=2,reasoning_gym:countdown?size=2")["test"]
    with pytest.raises(ConfigError, match="no sandbox 'docker'"):
        Rewards(None, joined, device="cpu")


def test_tasks_with_many_right_answers():
    """A task that names no right answer has none in its column, and is scored by its verifier, never as `None`."""
    row = load_benchmark("reasoning_gym:graph_color?size=1")[0]
    (problem,) = reasoning_gym.create_dataset("graph_color", size=1, seed=10**9)
    right = json.dumps(problem["metadata"]["possible_answer"])
    assert row["answer"] is None
    assert reasoning_gym_accuracy([f"Answer: {right}", "Answer: None"], [row["gym"]] * 2) == [1.0, 0.0]
    assert math_accuracy(["Answer: None"], answer=[row["answer"]]) == [None]


def test_an_error_of_a_verifier(monkeypatch):
    """An answer on which a verifier fails is wrong, and does not end the run."""

    def fail(*_):
        raise RecursionError

    monkeypatch.setattr(DATASETS["gcd"][0], "score_answer", fail)
    row = load_benchmark("reasoning_gym:gcd?size=1")[0]
    assert reasoning_gym_accuracy(["Answer: 1"], [row["gym"]]) == [0.0]
