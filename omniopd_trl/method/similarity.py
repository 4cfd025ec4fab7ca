# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Similarity of two texts: the functions `phi(chunk, rollout)` in [0, 1] (Eq. 3)."""

import math
import re
import unicodedata
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray
from rapidfuzz.distance import LCSseq, Levenshtein
from rapidfuzz.process import cpdist

from omniopd_trl.errors import ConfigError, import_extra
from omniopd_trl.method.custom import why_not_called

Similarity = Callable[[str, str], float]
_Prepared = TypeVar("_Prepared")

# Tolerance for float32 rounding of a cosine that is exactly 1 in theory.
_ROUNDING = 1e-6


def get_similarity(
    name_or_callable: str | Similarity, *, embedding_model: str = "sentence-transformers/all-MiniLM-L6-v2"
) -> Similarity:
    r"""Return the similarity function of the given name, or wrap a custom function with checks.

    `phi: (y_c, y_teacher) -> [0, 1]`.

    Every function ignores outer white space, since chat services trim it. Two empty texts score 1, and an empty text
    against a non-empty one scores 0. The named functions score equal texts 1, even if they contain no word. Only
    `"edit"` and `"exact"` are case-sensitive.

    - `"edit"`: `1 - d / max(len)`, with `d` the Levenshtein distance in characters.
    - `"rouge1"`: F-measure of the common words.
    - `"rougeL"`: F-measure of the longest common subsequence of words.
    - `"jaccard"`: distinct words in both over distinct words in either.
    - `"bleu1"`, `"bleu2"`: sentence BLEU of the chunk against the rollout, up to single words or pairs of words, with
      effective order and exponential smoothing. Not symmetric.
    - `"exact"`: 1 for equal texts, else 0.
    - `"embedding"`: cosine of sentence embeddings, clipped at 0. Needs the extra `embedding`.

    Args:
        name_or_callable: one of the names above, or a function of two texts that returns a number in [0, 1].
        embedding_model: path or id of the sentence-transformers model that `"embedding"` uses.

    Returns:
        A function of two texts, the chunk first. `similarity_matrix` scores many pairs with it at once.

    Raises:
        ConfigError: when the name is unknown, or a custom function cannot be called with two texts. The returned
            function raises it when a custom function returns anything but a finite number in [0, 1].
        MissingExtraError: for `"embedding"`, when sentence-transformers is not installed.

    Example:
        >>> get_similarity("rouge1")("the cat sat", "The cat.")
        0.8

    Reference: Eq. 3 and Table 3.
    """
    if isinstance(name_or_callable, _Named | _Own):
        return name_or_callable
    if name_or_callable == "embedding":
        return _embedding(embedding_model)
    if isinstance(name_or_callable, str):
        if name_or_callable not in _NAMED:
            raise ConfigError(
                f"`similarity` is {name_or_callable!r}, which is unknown. "
                f"Use one of {', '.join([*_NAMED, 'embedding'])}, or pass a function of two texts."
            )
        return _NAMED[name_or_callable]
    if not callable(name_or_callable):
        raise ConfigError(
            f"`similarity` is {name_or_callable!r}, which is neither a name nor a function. "
            f"Use one of {', '.join([*_NAMED, 'embedding'])}, or pass a function of two texts."
        )
    if why := why_not_called(name_or_callable, 2):
        raise ConfigError(
            f"The similarity function {name_or_callable!r} cannot be called with two texts: {why}. Pass a function "
            "`f(chunk, rollout)` that returns a number in [0, 1]."
        )
    return _Own(name_or_callable)


def name_or_function(similarity: Similarity) -> str | Similarity:
    """The name of a similarity of this module, or the custom function itself.

    Args:
        similarity: a result of `get_similarity`.
    """
    if isinstance(similarity, _Named):
        return next((name for name, named in _NAMED.items() if named is similarity), "embedding")
    return similarity.function if isinstance(similarity, _Own) else similarity


def similarity_matrix(
    chunks: Sequence[str], rollouts: Sequence[Sequence[str]], similarity: str | Similarity
) -> list[list[float]]:
    r"""Similarity of each chunk to each of its rollouts, all scored in one batch.

    `phi(y_c, y_teacher^(i))` at row `c`, column `i`; the sum of row `c` is `k_sem` of that chunk.

    Args:
        chunks: the student's texts.
        rollouts: for each chunk, the teacher's texts. Rows may differ in length, and may be empty.
        similarity: an argument or a result of `get_similarity`.

    Returns:
        One row for each chunk, one number in [0, 1] for each of its rollouts.

    Raises:
        ConfigError: when the numbers of chunks and rows differ, or when `get_similarity` raises it.

    Example:
        >>> similarity_matrix(["abcd", "xy"], [["abcd", "abce"], []], "edit")
        [[1.0, 0.75], []]

    Reference: Eq. 3.
    """
    if len(chunks) != len(rollouts):
        raise ConfigError(
            f"There are {len(chunks)} chunks and {len(rollouts)} lists of rollouts, but each chunk needs "
            "one list. Pass an empty list for a chunk without rollouts."
        )
    phi = get_similarity(similarity)
    assert isinstance(phi, _Named | _Own)  # guaranteed by `get_similarity`
    scores = iter(phi.score([(chunk, text) for chunk, row in zip(chunks, rollouts, strict=True) for text in row]))
    return [[next(scores) for _ in row] for row in rollouts]


@dataclass(frozen=True)
class _Named(Generic[_Prepared]):
    """A similarity of this module.

    Args:
        prepare: converts each distinct text once into the form that is compared (words, an embedding).
        compare: scores pairs of prepared texts, all at once.
    """

    prepare: Callable[[list[str]], list[_Prepared]]
    compare: Callable[[list[_Prepared], list[_Prepared]], Sequence[float]]

    def __call__(self, chunk: str, rollout: str) -> float:
        return self.score([(chunk, rollout)])[0]

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        pairs = [(chunk.strip(), rollout.strip()) for chunk, rollout in pairs]
        scores = [float(chunk == rollout) for chunk, rollout in pairs]
        # Pairs of equal texts, and pairs with an empty text, already have their score.
        open_ = [i for i, (chunk, rollout) in enumerate(pairs) if chunk and rollout and chunk != rollout]
        if not open_:
            return scores
        texts = list(dict.fromkeys(text for i in open_ for text in pairs[i]))
        prepared = dict(zip(texts, self.prepare(texts), strict=True))
        compared = self.compare([prepared[pairs[i][0]] for i in open_], [prepared[pairs[i][1]] for i in open_])
        for i, score in zip(open_, compared, strict=True):
            scores[i] = float(score)
        return scores


@dataclass(frozen=True)
class _Own:
    """A custom similarity. Its result is checked at each call."""

    function: Similarity

    def __call__(self, chunk: str, rollout: str) -> float:
        chunk, rollout = chunk.strip(), rollout.strip()
        if not (chunk and rollout):
            return float(chunk == rollout)
        score: Any = self.function(chunk, rollout)
        try:
            number = math.nan if isinstance(score, str) else float(score)
        except (TypeError, ValueError):
            number = math.nan
        if not -_ROUNDING <= number <= 1 + _ROUNDING:
            raise ConfigError(
                f"The similarity function {self.function!r} returned {score!r} for {chunk!r} and {rollout!r}, but a "
                "similarity is a finite number in [0, 1]. Scale or clip what the function returns."
            )
        return min(max(number, 0.0), 1.0)

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        return [self(chunk, rollout) for chunk, rollout in pairs]


# ---- words ----------------------------------------------------------------------------------------------------------

# Ranges in which every letter is a word: kana, bopomofo, Han and Hangul, with their extensions and half-width forms.
_CJK = (
    "\u1100-\u11ff\u3005-\u9fff\ua960-\ua97f\uac00-\ud7ff\uf900-\ufaff\uff66-\uffdc"
    "\U0001aff0-\U0001b16f\U00020000-\U0003ffff"
)
_ASCII_WORD = re.compile("[a-z0-9]+")


def _words(text: str) -> list[str]:
    """Runs of letters and digits, in lower case: on ASCII text exactly the words of rouge-score."""
    text = text.casefold()
    if text.isascii():
        return _ASCII_WORD.findall(text)
    # Composed and decomposed accents are the same word.
    return _unicode_word().findall(unicodedata.normalize("NFC", text))


@cache
def _marks() -> str:
    r"""Characters that belong to the character before them: combining marks and joiners.

    Without them, Python's `\w` splits words of Hindi, Arabic or Persian. No mark lies outside the two ranges.
    """
    codes = chain(range(0x300, 0x20000), range(0xE0100, 0xE01F0))
    return "\u200c\u200d" + "".join(chr(code) for code in codes if unicodedata.category(chr(code)).startswith("M"))


@cache
def _unicode_word() -> re.Pattern[str]:
    return re.compile(rf"(?!\W)[{_CJK}][{_marks()}]*|(?:[^\W_{_CJK}][{_marks()}]*)+")


@cache
def _unicode_separate() -> re.Pattern[str]:
    """CJK characters, and punctuation and symbols beyond ASCII."""
    return re.compile(rf"((?:(?!\W)[{_CJK}]|[^\w\s\x00-\x7f{_marks()}])[{_marks()}]*)")


# The rules of mteval-v13a, sacrebleu's default: punctuation becomes words, except inside numbers.
_BLEU_CLEAN = (
    ("<skipped>", ""),
    ("-\n", ""),
    ("\n", " "),
    ("&quot;", '"'),
    ("&amp;", "&"),
    ("&lt;", "<"),
    ("&gt;", ">"),
)
_BLEU_SPLIT = (
    (re.compile(r"([{-~\[-` -&(-+:-@/])"), r" \1 "),
    (re.compile(r"([^0-9])([.,])"), r"\1 \2 "),
    (re.compile(r"([.,])([^0-9])"), r" \1 \2"),
    (re.compile(r"([0-9])(-)"), r"\1 \2 "),
)


def _bleu_words(text: str) -> list[str]:
    """Words and punctuation, in lower case: on ASCII text exactly the tokens of sacrebleu."""
    text = text.casefold()
    for old, new in _BLEU_CLEAN:
        text = text.replace(old, new)
    text = f" {text} "
    for pattern, split in _BLEU_SPLIT:
        text = pattern.sub(split, text)
    if not text.isascii():
        text = _unicode_separate().sub(r" \1 ", unicodedata.normalize("NFC", text))
    return text.split()


# ---- comparisons ----------------------------------------------------------------------------------------------------

_Items = Sequence[Hashable]


def _common(left: Sequence[_Items], right: Sequence[_Items]) -> list[int]:
    """Length of the longest common subsequence of each pair; for sorted lists the size of their multiset intersection.

    One routine of rapidfuzz thus counts common words (sorted) and finds common subsequences (in reading order).
    """
    return list(cpdist(left, right, scorer=LCSseq.similarity, dtype=np.int64).tolist())


def _edit(chunks: list[str], rollouts: list[str]) -> Sequence[float]:
    return list(cpdist(chunks, rollouts, scorer=Levenshtein.normalized_similarity, dtype=np.float64).tolist())


def _f_measure(chunks: list[_Items], rollouts: list[_Items]) -> Sequence[float]:
    """`2 P R / (P + R)` with `P = common / len(chunk)` and `R = common / len(rollout)`, simplified."""
    common = _common(chunks, rollouts)
    return [2 * c / max(len(a) + len(b), 1) for c, a, b in zip(common, chunks, rollouts, strict=True)]


def _jaccard(chunks: list[_Items], rollouts: list[_Items]) -> Sequence[float]:
    common = _common(chunks, rollouts)
    return [c / max(len(a) + len(b) - c, 1) for c, a, b in zip(common, chunks, rollouts, strict=True)]


def _bleu(chunks: list[list[_Items]], rollouts: list[list[_Items]]) -> Sequence[float]:
    """`BP * (prod_{n <= N} p_n)^(1/N)`, from the sorted n-grams of each order."""
    matches_of_order = [
        _common([chunk[n] for chunk in chunks], [rollout[n] for rollout in rollouts]) for n in range(len(chunks[0]))
    ]
    matches_of_pair = zip(*matches_of_order, strict=True)
    return [
        _bleu_score(matches, [len(grams) for grams in chunk], len(rollout[0]))
        for matches, chunk, rollout in zip(matches_of_pair, chunks, rollouts, strict=True)
    ]


def _bleu_score(matches: Sequence[int], totals: Sequence[int], rollout_length: int) -> float:
    if not any(matches):
        return 0.0
    product, smooth, order = 1.0, 1, 0
    for match, total in zip(matches, totals, strict=True):
        if total == 0:  # effective order: a text of one word has no bigrams
            break
        order += 1
        if match == 0:
            smooth *= 2
            product *= 1 / (smooth * total)
        else:
            product *= match / total
    brevity_penalty = min(1.0, math.exp(1 - rollout_length / totals[0]))
    return brevity_penalty * math.pow(product, 1 / order)


def _cosine(chunks: list[NDArray[np.float64]], rollouts: list[NDArray[np.float64]]) -> Sequence[float]:
    # The upper clip undoes rounding.
    return list(np.clip(np.einsum("pd,pd->p", np.stack(chunks), np.stack(rollouts)), 0.0, 1.0).tolist())


@cache  # keeps one copy of each model in memory
def _embedding(model: str) -> "_Named[NDArray[np.float64]]":
    encoder = import_extra("sentence_transformers", "embedding").SentenceTransformer(model)

    def encode(texts: list[str]) -> list[NDArray[np.float64]]:
        vectors = np.asarray(encoder.encode(texts, convert_to_numpy=True, show_progress_bar=False), np.float64)
        # A vector of zeros would divide 0 by 0.
        return list(vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12))

    return _Named(encode, _cosine)


def _each(prepare: Callable[[str], _Prepared]) -> Callable[[list[str]], list[_Prepared]]:
    return lambda texts: [prepare(text) for text in texts]


def _sorted_ngrams(max_order: int) -> Callable[[str], list[_Items]]:
    def prepare(text: str) -> list[_Items]:
        words = _bleu_words(text)
        return [sorted(zip(*(words[i:] for i in range(n)), strict=False)) for n in range(1, max_order + 1)]

    return prepare


_NAMED: dict[str, _Named[Any]] = {
    "edit": _Named(list, _edit),
    "rouge1": _Named(_each(lambda text: sorted(_words(text))), _f_measure),
    "rougeL": _Named(_each(_words), _f_measure),
    "jaccard": _Named(_each(lambda text: sorted(set(_words(text)))), _jaccard),
    "bleu1": _Named(_each(_sorted_ngrams(1)), _bleu),
    "bleu2": _Named(_each(_sorted_ngrams(2)), _bleu),
    # `score` handles equal texts before any comparison.
    "exact": _Named(list, lambda chunks, rollouts: [0.0] * len(chunks)),
}
