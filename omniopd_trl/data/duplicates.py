# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Evaluation problems that are also, or nearly, in the training data."""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rapidfuzz.distance import LCSseq

# Scripts without spaces between words: Thai and its neighbours, Japanese, Chinese.
_UNSPACED = r"\u0e00-\u0eff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
# Letters and digits in sequence, single letters of those scripts, and the operators that tell one calculation from
# another. Other marks are formatting.
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+|[-+*/=<>^!|]")
_NUMBER = re.compile(r"\d+")
# A wording is told by three words whatever the numbers; two problems of one wording by five words with their numbers.
_OF_WORDING, _OF_NUMBERS = 3, 5
# Sequences of words that more evaluation problems share are the wording of the set, and not of a problem.
_COMMON = 0.05
# A training problem is compared word by word if it has more than this share of a problem's own sequences. A word that
# differs costs three of them, so all problems are compared that have four fifths of the words in the same places. Of
# problems that have one wording, those that share half of their numbers are not the same.
_BY_WORDING, _BY_NUMBERS = 1 / 3, 1 / 2


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

    Case, spaces, punctuation and LaTeX's marks do not count. Only problems that share more than a third of the
    sequences of three words that are particular to the evaluation problem are compared, numbers apart, so the time
    grows with the length of both sets and not with their product. Of problems whose whole wording is that of their
    set, sequences of five words with their numbers are compared instead.

    Args:
        training: texts of the training problems.
        evaluation: texts of the evaluation problems.
        threshold: lowest similarity that is reported, above 0 and at most 1. Below 0.8, not all pairs are compared.

    Returns:
        One entry per evaluation problem that has a near-duplicate, the most similar first.
    """
    words = [_words(text) for text in evaluation]
    wordings = [_wording(problem) for problem in words]
    wholes = [_sequences(problem, _OF_NUMBERS) for problem in words]
    shared_by = Counter(sequence for problem in (*wordings, *wholes) for sequence in problem)
    common = max(_COMMON * len(words), 3)

    def particular(problem: set[str]) -> set[str]:
        return {sequence for sequence in problem if shared_by[sequence] <= common}

    own, needed = [], []
    for wording, whole in zip(wordings, wholes, strict=True):
        by_wording = particular(wording)
        # A problem that is wholly the wording of the set, with its numbers, is compared by all of it.
        own.append(by_wording or particular(whole) or whole)
        needed.append((_BY_WORDING if by_wording else _BY_NUMBERS) * len(own[-1]))
    index = defaultdict(list)
    for number, problem in enumerate(own):
        for sequence in problem:
            index[sequence].append(number)

    best: dict[int, tuple[float, int]] = {}
    count: Counter[int] = Counter()
    for row, text in enumerate(training):
        candidate = _words(text)
        sequences = _wording(candidate) | _sequences(candidate, _OF_NUMBERS)
        found = Counter(number for s in sequences if s in index for number in index[s])
        for number, hits in found.items():
            if hits <= needed[number]:
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


def _wording(words: list[str]) -> set[str]:
    return _sequences([_NUMBER.sub("0", word) for word in words], _OF_WORDING)


def _sequences(words: list[str], length: int) -> set[str]:
    if not words:
        return set()
    return {" ".join(words[i : i + length]) for i in range(max(len(words) - length, 0) + 1)}
