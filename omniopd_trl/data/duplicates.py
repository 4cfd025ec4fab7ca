# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Evaluation problems that are also, or nearly, in the training data."""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rapidfuzz.distance import LCSseq

# Letters and digits in sequence, and the operators that tell one calculation from another. Other marks are formatting.
_WORD = re.compile(r"[^\W_]+|[-+*/=<>^!|]")
_LENGTH = 5
# Sequences of words that more evaluation problems share are the wording of the set, and not of a problem.
_COMMON = 0.05
# A training problem is compared word by word if it has more than this share of a problem's own sequences.
_CANDIDATE = 0.5


@dataclass(frozen=True)
class NearDuplicate:
    """An evaluation problem with its most similar training problem.

    Attributes:
        evaluation: number of the evaluation problem, from 0.
        training: number of the training problem, from 0.
        similarity: share of the evaluation problem's words that the training problem has in the same order.
        others: number of other training problems that are as similar as the threshold.
    """

    evaluation: int
    training: int
    similarity: float
    others: int


def near_duplicates(training: Iterable[str], evaluation: Sequence[str], threshold: float = 0.8) -> list[NearDuplicate]:
    """Find evaluation problems that are nearly in the training data.

    Case, spaces, punctuation and LaTeX's marks do not count. Only problems that share more than half of the sequences
    of five words that are particular to the evaluation problem are compared, so the time grows with the length of both
    sets and not with their product: seconds for 17,000 and 500 problems.

    Args:
        training: texts of the training problems.
        evaluation: texts of the evaluation problems.
        threshold: lowest similarity that is reported, above 0 and at most 1.

    Returns:
        One entry per evaluation problem that has a near-duplicate, the most similar first.
    """
    words = [_words(text) for text in evaluation]
    sequences = [_sequences(problem) for problem in words]
    shared_by = Counter(sequence for problem in sequences for sequence in problem)
    common = max(_COMMON * len(words), 3)
    # A problem whose wording is wholly that of the set is compared by all of it.
    own = [{s for s in problem if shared_by[s] <= common} or problem for problem in sequences]
    index = defaultdict(list)
    for number, problem in enumerate(own):
        for sequence in problem:
            index[sequence].append(number)

    best: dict[int, tuple[float, int]] = {}
    count: Counter[int] = Counter()
    for row, text in enumerate(training):
        candidate = _words(text)
        found = Counter(number for s in _sequences(candidate) if s in index for number in index[s])
        for number, hits in found.items():
            if hits <= _CANDIDATE * len(own[number]):
                continue
            similarity = LCSseq.similarity(words[number], candidate) / len(words[number])
            if similarity >= threshold:
                count[number] += 1
                if number not in best or similarity > best[number][0]:
                    best[number] = similarity, row
    pairs = [NearDuplicate(number, row, share, count[number] - 1) for number, (share, row) in best.items()]
    return sorted(pairs, key=lambda pair: (-pair.similarity, pair.evaluation))


def _words(text: str) -> list[str]:
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def _sequences(words: list[str]) -> set[str]:
    if not words:
        return set()
    return {" ".join(words[i : i + _LENGTH]) for i in range(max(len(words) - _LENGTH, 0) + 1)}
