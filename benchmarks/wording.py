# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""What each similarity sees of the demo's teachers with fixed and with random words.

    python -m benchmarks.wording -o docs/results/wording.json

At the first result that a student may get wrong, each teacher continues the student's text eight times. Its rollouts
are compared with each other, with the student's chunk that has the right result, and with the one that has the wrong
result.
"""

import argparse
import asyncio
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from benchmarks.results import write_json
from omniopd_trl.audits.alignment import Alignment
from omniopd_trl.demo import asset_path
from omniopd_trl.demo.world import Problem, Slip, problems, solution
from omniopd_trl.method import Chunk, similarity_matrix
from omniopd_trl.teachers import Prefix, Rollout, SamplingRequest
from omniopd_trl.teachers.local import LocalTeacher

TEACHERS = "teacher", "teacher_varied"
SIMILARITIES = "exact", "edit", "rouge1", "bleu2"
# Those of the demo's recipe.
CHUNK_LENGTH, ROLLOUTS_OF_A_CHUNK = 10, 4
NUM_PLACES, NUM_ROLLOUTS = 256, 8


@dataclass(frozen=True)
class Place:
    """A result that a student may get wrong.

    Attributes:
        prefix: what the teacher continues.
        right: the student's chunk with the right result.
        wrong: the chunk with the wrong result.
        token_ids: tokens of the right chunk.
    """

    prefix: Prefix
    right: str
    wrong: str
    token_ids: list[int]


def places(count: int) -> list[Place]:
    """The first such result of some problems of the demo."""
    tokenizer = AutoTokenizer.from_pretrained(asset_path("student"))
    return list(islice((place for problem in problems("wording") for place in _places(problem, tokenizer)), count))


def _places(problem: Problem, tokenizer: PreTrainedTokenizerBase) -> Iterator[Place]:
    """One place, or none if the student cannot slip."""
    texts = solution(problem, "student"), solution(problem, "student", Slip(1.0, 1.0, 1.0), random.Random(0))
    digits = next((i for i, (right, wrong) in enumerate(zip(*texts, strict=False)) if right != wrong), None)
    if digits is None:
        return
    before = texts[0][:digits].rstrip("0123456789")
    right, wrong = (tokenizer(text[len(before) :])["input_ids"][:CHUNK_LENGTH] for text in texts)
    prompt = [{"role": "user", "content": problem.question}]
    yield Place(Prefix(prompt, before), tokenizer.decode(right), tokenizer.decode(wrong), right)


def sample(name: str, where: Sequence[Place], count: int = NUM_ROLLOUTS, seed: int = 0) -> list[tuple[Rollout, ...]]:
    """Rollouts of one of the demo's teachers at each place."""
    torch.manual_seed(seed)
    teacher = LocalTeacher(str(asset_path(name)))
    request = SamplingRequest(count, max_tokens=3 * CHUNK_LENGTH, temperature=1.0)
    replies = asyncio.run(teacher.sample([place.prefix for place in where], request))
    return [reply.rollouts for reply in replies]


def cut(where: Sequence[Place], rollouts: Sequence[Sequence[Rollout]]) -> list[list[str]]:
    """The rollouts at each place, cut to as many tokens of the student as the right chunk has."""
    alignment = Alignment(AutoTokenizer.from_pretrained(asset_path("student")))
    return [
        alignment.cut(place.token_ids, [Chunk(0, len(place.token_ids), 0)], [place.right], [given])[0][0]
        for place, given in zip(where, rollouts, strict=True)
    ]


def compare(where: Sequence[Place], rollouts: Sequence[Sequence[str]], name: str) -> dict[str, Any]:
    """Means of one similarity over all places.

    Returns:
        `rollouts`, of two rollouts at one place; `right` and `wrong`, of a chunk and a rollout; and `ranked`, the
        share of places where four rollouts are more similar to the right chunk than to the wrong one. Ties count as
        one half.
    """
    pairs = similarity_matrix([texts[0] for texts in rollouts], [texts[1:] for texts in rollouts], name)
    right, wrong = (
        np.array(similarity_matrix([getattr(place, which) for place in where], rollouts, name))
        for which in ("right", "wrong")
    )
    gains = (right - wrong)[:, :ROLLOUTS_OF_A_CHUNK].mean(1)
    return {
        "rollouts": float(np.mean(pairs)),
        "right": float(right.mean()),
        "wrong": float(wrong.mean()),
        "ranked": float(np.mean((np.sign(gains) + 1) / 2)),
    }


def main() -> None:
    """Write the similarities of both teachers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(1)
    where = places(NUM_PLACES)
    rows = []
    for teacher in TEACHERS:
        rollouts = cut(where, sample(teacher, where))
        rows += [{"teacher": teacher, "similarity": name} | compare(where, rollouts, name) for name in SIMILARITIES]
    write_json(options.output, {"num_places": len(where), "num_rollouts": NUM_ROLLOUTS, "rows": rows})


if __name__ == "__main__":
    main()
