# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""What the tests of all servers ask: the problems, their nested prefixes, and the exact next-token distribution."""

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset

from omniopd_trl.demo import asset_path
from omniopd_trl.teachers import LocalTeacher, Prefix, SamplingRequest, Teacher, TeacherReply

GREEDY = {"temperature": 0.0}

# The demo's student, in micro-batches whose audits come back while earlier ones train.
TRAINING: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "learning_rate": 0.01,
    "num_rollouts": 4,
}


def problems(count: int) -> list[str]:
    """Questions of the demo's test set."""
    with (asset_path("problems") / "test.jsonl").open() as lines:
        return [json.loads(line)["question"] for line, _ in zip(lines, range(count), strict=False)]


def conversation(question: str) -> list[dict[str, Any]]:
    """A question as a chat."""
    return [{"role": "user", "content": question}]


def dataset(count: int) -> Dataset:
    """The questions as the trainer takes them."""
    return Dataset.from_list([{"prompt": conversation(question)} for question in problems(count)])


def ask(
    teacher: Teacher,
    trajectories: Sequence[Sequence[Prefix]],
    num_samples: int = 1,
    max_tokens: int = 40,
    **kwargs: Any,
) -> list[list[TeacherReply]]:
    """Sample for all trajectories at once, as the trainer does, and close."""
    request = SamplingRequest(num_samples, max_tokens, **kwargs)

    async def run() -> list[list[TeacherReply]]:
        try:
            return await asyncio.gather(*(teacher.sample(prefixes, request) for prefixes in trajectories))
        finally:
            await teacher.aclose()

    return asyncio.run(run())


def ask_one(
    teacher: Teacher, prefix: Prefix, num_samples: int = 1, max_tokens: int = 40, **kwargs: Any
) -> TeacherReply:
    """The reply to a single prefix."""
    return ask(teacher, [[prefix]], num_samples, max_tokens, **kwargs)[0][0]


def nested(local: LocalTeacher, count: int, step: int) -> list[list[Prefix]]:
    """Prefixes of the teacher's own solutions, in ascending order; they end wherever `step` falls, also in words."""
    questions = problems(count)
    solutions = ask(local, [[Prefix(conversation(question))] for question in questions], max_tokens=160, **GREEDY)
    return [
        [Prefix(conversation(question), text[:end]) for end in range(0, len(text), step)]
        for question, (reply,) in zip(questions, solutions, strict=True)
        for text in [reply.rollouts[0].text]
    ]


def awkward() -> list[Prefix]:
    """Beginnings that a template or a server might trim, misread, or take for its own."""
    texts = (
        " ",
        "\n",
        "Let us ",
        "Let us\n\n",
        "  Let us  ",
        "\tLet\t",
        "user",
        "end",
        "im",
        "|>",
        "<|im_end|>",
        "é🙂",
    )
    question = problems(1)[0]
    return [Prefix(conversation(question), text) for text in texts] + [Prefix(conversation(question), question)]


def assert_same(expected: list[list[TeacherReply]], replies: list[list[TeacherReply]]) -> None:
    """Texts and reasons of their ends are equal, and so are the numbers of tokens, of the prompts and of the texts."""
    for theirs, ours in zip(expected, replies, strict=True):
        assert [reply.rollouts for reply in ours] == [reply.rollouts for reply in theirs]
        assert [r.usage.prompt_tokens for r in ours] == [r.usage.prompt_tokens for r in theirs]
        assert [r.usage.completion_tokens for r in ours] == [r.usage.completion_tokens for r in theirs]


def next_token(local: LocalTeacher, prefix: Prefix, temperature: float) -> dict[str, float]:
    """The exact distribution of the next token, as text: tokens without a text of their own count together."""
    with torch.no_grad():
        logits = local.model(torch.tensor([local.encode(prefix)])).logits[0, -1].double()
    probabilities = (logits / temperature).softmax(-1).tolist()
    found: dict[str, float] = {}
    for token, probability in enumerate(probabilities):
        text = local.tokenizer.decode([token], skip_special_tokens=True)
        found[text] = found.get(text, 0.0) + probability
    return found


def least_sure(local: LocalTeacher) -> Prefix:
    """A beginning after which the teacher hesitates; where it is sure of itself, every sampling looks the same."""
    question = conversation(problems(1)[0])
    prefixes = [Prefix(question, text) for text in ("I think", "We know that", "It is", "So", "What")]
    return min(prefixes, key=lambda prefix: max(next_token(local, prefix, 1.0).values()))


def distance(expected: dict[str, float], reply: TeacherReply, likeliest: int = 8) -> float:
    """Total variation between what was sampled and what should have been, over the likeliest texts and the rest."""
    texts = [rollout.text for rollout in reply.rollouts] + [""] * reply.outcomes.get("empty", 0)
    top = sorted(expected, key=lambda text: -expected[text])[:likeliest]
    differences = [texts.count(text) / len(texts) - expected[text] for text in top]
    return (sum(map(abs, differences)) + abs(sum(differences))) / 2


def nucleus(expected: dict[str, float], top_p: float) -> set[str]:
    """The texts that nucleus sampling leaves."""
    left: set[str] = set()
    mass = 0.0
    for text in sorted(expected, key=lambda text: -expected[text]):
        if mass >= top_p:
            break
        left.add(text)
        mass += expected[text]
    return left
