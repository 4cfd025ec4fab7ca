# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Effect of the repair of instructed answers on similarities, with recorded answers.

    python -m benchmarks.instruct_repair

`data/instructed_answers.json` holds 18 problems with solutions and 143 prefixes of them that end between two tokens
(inside words and numbers, after words, after line breaks). SmolLM2-135M-Instruct answered the messages of
`render_messages` for each prefix three times (twice sampled at temperature 1, once greedy), and continued the prefix
directly once, which gives a continuation with a known boundary; 40 tokens each. The file also holds the merges of its
tokenizer that these texts use.

An answer is repaired, cut to the length of a chunk of 50 student tokens and compared with the chunk. Printed are the
share of answers that equal the true continuation except for outer white space, and the difference between their
similarity to the chunk and that of the true continuation:

- true continuations without their outer white space, as chat services return them. The teacher repeats the student
  (every boundary between two tokens of the solutions), or writes its own continuation.
- true continuations after an echo of the last words of the prefix, and the cases of the tests.
- the model's answers: the number of restarts.

The exit code is 1 if `repair` changes a true continuation, or if outer white space changes a similarity.
"""

import json
import random
import re
import sys
from collections import Counter
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from omniopd_trl.audits.alignment import Alignment
from omniopd_trl.method.chunks import Chunk
from omniopd_trl.method.similarity import similarity_matrix
from omniopd_trl.teachers import Rollout
from omniopd_trl.teachers.instruct.repair import repair

CHUNK = 50
SIMILARITIES = ("edit", "exact", "rouge1")
DATA = json.loads((Path(__file__).parent / "data" / "instructed_answers.json").read_text(encoding="utf-8"))
# Prefix, the student's text after it, and the true continuation.
Item = tuple[str, str, str]


def tokenizer() -> PreTrainedTokenizerFast:
    """The student's tokenizer: the subset of SmolLM2's that encodes the texts of the file identically."""
    merges = [tuple(merge.split(" ")) for merge in DATA["merges"]]
    pieces = dict.fromkeys([*sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)])
    byte_pairs = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    byte_pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_pairs.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=byte_pairs)


STUDENT = tokenizer()
ALIGNMENT = Alignment(STUDENT)


def students_words() -> list[Item]:
    """The teacher repeats the student's text, at every boundary between two tokens of the solutions."""
    items = []
    for problem in DATA["problems"]:
        solution = problem["solution"]
        token_ids = STUDENT(solution)["input_ids"]
        ends = {len(STUDENT.decode(token_ids[:i])) for i in range(4, len(token_ids) - 6)}
        for end in sorted(ends):
            prefix, rest = solution[:end], solution[end:]
            before = STUDENT(prefix)["input_ids"]
            if before == token_ids[: len(before)]:
                items.append((prefix, rest, rest[:400]))
    return items


def teachers_words() -> list[Item]:
    """The teacher writes its own continuation."""
    items = []
    for answer in DATA["answers"]:
        solution = DATA["problems"][answer["problem"]]["solution"]
        prefix, rest = solution[: answer["split"]], solution[answer["split"] :]
        if answer["continued"].strip():
            items.append((prefix, rest, answer["continued"]))
    return items


def changes(items: list[Item], texts: list[str]) -> dict[str, list[float]]:
    """Absolute differences between the similarities of the texts and of the true continuations to the chunk.

    Args:
        items: prefix, the student's text after it, and the true continuation.
        texts: the repaired answers.
    """
    token_ids, chunks = [], []
    for _, rest, _ in items:
        start = len(token_ids)
        token_ids += STUDENT(rest)["input_ids"][:CHUNK]
        chunks.append(Chunk(start, len(token_ids), start))
    chunk_texts = [STUDENT.decode(token_ids[chunk.start : chunk.end]) for chunk in chunks]
    rollouts = [[Rollout(truth), Rollout(text)] for (_, _, truth), text in zip(items, texts, strict=True)]
    pairs, _ = ALIGNMENT.cut(token_ids, chunks, chunk_texts, rollouts)
    return {
        name: [abs(changed - right) for right, changed in similarity_matrix(chunk_texts, pairs, name)]
        for name in SIMILARITIES
    }


def report(title: str, items: list[Item], answers: list[str]) -> float:
    """Print the effect of `repair` on the answers.

    Returns:
        The mean change of the similarity `edit` with `repair`.
    """
    print(f"{title}: {len(items)} answers")
    repaired = [repair(item[0], answer).text for item, answer in zip(items, answers, strict=True)]
    for name, texts in (("as it came", answers), ("`repair`", repaired)):
        right = sum(text.strip() == item[2].strip() for item, text in zip(items, texts, strict=True)) / len(items)
        differences = changes(items, texts)
        numbers = [f"{sum(d) / len(d):9.4f} {max(d):7.3f}" for d in differences.values()]
        print(f"  {name:44} {right:.3f}  " + " ".join(numbers))
    return sum(differences["edit"]) / len(items)


def echoes(items: list[Item]) -> list[str]:
    """The true continuations, each after an echo of the prefix's last one to eight words."""
    source = random.Random(0)
    answers = []
    for prefix, _, truth in items:
        starts = [word.start() for word in re.finditer(r"\S+", prefix)]
        answers.append(prefix[starts[-min(len(starts), source.randint(1, 8))] :] + truth)
    return answers


def recorded() -> None:
    """Print the outcomes of the model's answers, such as restarts."""
    outcomes = Counter()
    for answer in DATA["answers"]:
        problem = DATA["problems"][answer["problem"]]
        prefix = problem["solution"][: answer["split"]]
        outcomes.update(
            repair(prefix, text, problem["problem"]).outcome for text in (*answer["sampled"], answer["greedy"])
        )
    print(f"Answers of SmolLM2 to the instruction: {outcomes.total()}, by outcome: {dict(outcomes)}")


def main() -> int:
    from tests.support.instruct_cases import CASES

    own, other = students_words(), teachers_words()
    cases = [case for case in CASES if case.outcome == "ok"]
    print(f"{'':47} right" + "".join(f"{name + ' mean':>14} max" for name in SIMILARITIES))
    moved = report("The student's words", own, [item[2].strip() for item in own])
    moved += report("The teacher's words", other, [item[2].strip() for item in other])
    report("The student's words after an echo", own, echoes(own))
    report(
        "Cases of the tests",
        [(case.prefix, case.text, case.text) for case in cases],
        [case.output for case in cases],
    )
    recorded()
    changed = sum(repair(prefix, truth).text != truth for prefix, _, truth in own + other)
    print(f"True continuations that `repair` changes: {changed} of {len(own + other)}")
    return int(changed > 0 or moved > 0)


if __name__ == "__main__":
    sys.exit(main())
