# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""What the repair of instructed answers changes in the similarities, on recorded answers.

    python -m benchmarks.instruct_repair

`data/instructed_answers.json` holds 18 problems with solutions and 143 prefixes of them that end between two tokens
(inside words and numbers, after words, after line breaks). SmolLM2-135M-Instruct answered the messages of
`render_messages` for each prefix three times (twice sampled at temperature 1, once greedy), and continued the prefix
directly once, which gives a continuation whose joint is known; 40 tokens each. The file also holds the merges of its
tokenizer that these texts use, and where the word lists of an earlier version added a space.

An answer is repaired, cut to 50 student tokens and compared with the student's chunk. Printed are the share of answers
that are joined as the true continuation, and by how much their similarity to the chunk differs from its own:

- true continuations without their first space, as chat services return them. The student's own words (every boundary
  between two tokens of the solutions) show the largest change that a joint can make.
- true continuations after an echo of the last words of the prefix, and the cases of the tests.
- the model's answers: how many are restarts, and what a space at the joint would change at all.

The exit code is 1 when `repair` changes a true continuation, or when the student's words without their first space
differ by more than 0.002 in `edit`.
"""

import json
import random
import re
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from omniopd_trl.audits.alignment import Alignment
from omniopd_trl.method.similarity import similarity_matrix
from omniopd_trl.teachers import Rollout
from omniopd_trl.teachers.instruct.repair import repair

CHUNK, BOUND = 50, 0.002
SIMILARITIES = ("edit", "exact", "rouge1")
DATA = json.loads((Path(__file__).parent / "data" / "instructed_answers.json").read_text(encoding="utf-8"))
# Prefix, the student's text after it, the true continuation, and whether the word lists added a space.
Item = tuple[str, str, str, bool]


def tokenizer() -> PreTrainedTokenizerFast:
    """The student's: a part of SmolLM2's that encodes the texts of the file alike."""
    merges = [tuple(merge.split(" ")) for merge in DATA["merges"]]
    pieces = dict.fromkeys([*sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)])
    byte_pairs = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    byte_pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_pairs.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=byte_pairs)


STUDENT = tokenizer()
ALIGNMENT = Alignment(STUDENT)


def tokens(text: str) -> int:
    return len(STUDENT(text)["input_ids"])


def cut(text: str, length: int) -> str:
    return ALIGNMENT.cut([Rollout(text)], length)[0][0]


def students_words() -> list[Item]:
    """The teacher writes what the student wrote: every boundary between two tokens of the solutions."""
    items = []
    for problem in DATA["problems"]:
        solution = problem["solution"]
        token_ids = STUDENT(solution)["input_ids"]
        ends = {len(STUDENT.decode(token_ids[:i])) for i in range(4, len(token_ids) - 6)}
        for end in sorted(ends):
            prefix, rest = solution[:end], solution[end:]
            if STUDENT(prefix)["input_ids"] == token_ids[: tokens(prefix)]:
                items.append((prefix, rest, rest[:400], end in problem["word_lists"]))
    return items


def teachers_words() -> list[Item]:
    """The teacher writes its own continuation."""
    items = []
    for index, answer in enumerate(DATA["answers"]):
        solution = DATA["problems"][answer["problem"]]["solution"]
        prefix, rest = solution[: answer["split"]], solution[answer["split"] :]
        if answer["continued"].strip():
            items.append((prefix, rest, answer["continued"], index in DATA["word_lists"]))
    return items


def changes(items: list[Item], texts: list[str], *, strip: bool = False) -> dict[str, list[float]]:
    """By how much the similarity of chunk and text differs from that of chunk and true continuation.

    Args:
        texts: what each answer was repaired to.
        strip: cut the text without its outer white space, to as many tokens as the chunk has without its own.
    """
    chunks, pairs = [], []
    for (_, rest, truth, _), text in zip(items, texts, strict=True):
        chunk = cut(rest, CHUNK)
        right = cut(truth, tokens(chunk))
        if strip:
            chunk, right, text = chunk.strip(), cut(truth.strip(), tokens(chunk.strip())), text.strip()
        chunks.append(chunk)
        pairs.append([right, cut(text, tokens(chunk))])
    return {
        name: [abs(changed - right) for right, changed in similarity_matrix(chunks, pairs, name)]
        for name in SIMILARITIES
    }


def row(name: str, share: float | None, differences: dict[str, list[float]]) -> str:
    numbers = [f"{sum(d) / len(d):9.4f} {max(d):7.3f}" for d in differences.values()]
    return f"  {name:44} {'' if share is None else f'{share:.3f}':6} " + " ".join(numbers)


def report(title: str, items: list[Item], answers: list[str], *, joints: bool = False) -> float:
    """Print what each repair makes of the answers.

    Args:
        joints: whether nothing but the first space is missing.

    Returns:
        The mean change of `edit` with `repair`.
    """
    print(f"{title}: {len(items)} answers")
    repairs: dict[str, list[str]] = {"as it came": answers}
    if joints:
        repairs["word lists (an earlier version)"] = [
            " " * item[3] + answer for item, answer in zip(items, answers, strict=True)
        ]
    repairs["`repair`"] = [repair(item[0], answer).text for item, answer in zip(items, answers, strict=True)]
    for name, texts in repairs.items():
        right = sum(text.rstrip() == item[2].rstrip() for item, text in zip(items, texts, strict=True))
        differences = changes(items, texts)
        print(row(name, right / len(items), differences))
    if joints:
        print(row("as it came, cut without outer white space", None, changes(items, answers, strip=True)))
    return sum(differences["edit"]) / len(items)


def echoes(items: list[Item]) -> list[str]:
    """The true continuations after one to eight of the last words of the prefix."""
    source = random.Random(0)
    answers = []
    for prefix, _, truth, _ in items:
        starts = [word.start() for word in re.finditer(r"\S+", prefix)]
        answers.append(prefix[starts[-min(len(starts), source.randint(1, 8))] :] + truth)
    return answers


def recorded() -> None:
    """Print how many of the model's answers are restarts, and what a space would change in them."""
    items, restarts, total = [], 0, 0
    for answer in DATA["answers"]:
        problem = DATA["problems"][answer["problem"]]
        prefix, rest = problem["solution"][: answer["split"]], problem["solution"][answer["split"] :]
        for text in (*answer["sampled"], answer["greedy"]):
            repaired = repair(prefix, text, problem["problem"])
            restarts += repaired.outcome == "restarted"
            total += 1
            if repaired.text.strip():
                items.append((prefix, rest, repaired.text.lstrip(), False))
    print(f"Answers of SmolLM2 to the instruction: {total}, of which `repair` calls {restarts} restarts")
    print(row("with against without a space at the joint", None, changes(items, [f" {item[2]}" for item in items])))


def main() -> int:
    from tests.support.instruct_cases import CASES

    own, other = students_words(), teachers_words()
    cases = [case for case in CASES if case.outcome == "ok"]
    print(f"{'':47} right" + "".join(f"{name + ' mean':>14} max" for name in SIMILARITIES))
    mean = report("The student's words", own, [item[2].strip() for item in own], joints=True)
    report("The teacher's words", other, [item[2].strip() for item in other], joints=True)
    report("The student's words after an echo", own, echoes(own))
    report(
        "Cases of the tests",
        [(case.prefix, case.text, case.text, False) for case in cases],
        [case.output for case in cases],
    )
    recorded()
    changed = sum(repair(prefix, truth).text != truth for prefix, _, truth, _ in own + other)
    print(f"True continuations that `repair` changes: {changed} of {len(own + other)}")
    return int(bool(changed) or mean > BOUND)


if __name__ == "__main__":
    sys.exit(main())
