# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Eq. 3: how alike a chunk and a rollout are, against rouge-score and sacrebleu."""

import sys
import time
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score import rouge_scorer
from sacrebleu.metrics import BLEU

from omniopd_trl.errors import ConfigError, MissingExtraError
from omniopd_trl.method import similarity as similarity_module
from omniopd_trl.method.similarity import get_similarity, similarity_matrix

NAMES = ["edit", "rouge1", "rougeL", "jaccard", "bleu1", "bleu2", "exact"]
WORD_BASED = ["rouge1", "rougeL", "jaccard", "bleu1", "bleu2"]

ROUGE = rouge_scorer.RougeScorer(["rouge1", "rougeL"])
SACREBLEU = {order: BLEU(max_ngram_order=order, effective_order=True, lowercase=True) for order in (1, 2)}

# Everything that the tokenizers of the oracles treat in a way of its own, often enough to meet.
ASCII = st.text(st.sampled_from("abAB 019.,-_'!&;<>()$=\\\n\t"), max_size=30)
WORDS = (
    "the The cat sat on 12 3.5 1,000 3-4 x_1 $5 (b) a. end. don't well-known - co-\nop "
    "&amp; &quot; <skipped> a<skipped>b"
).split(" ")
SENTENCES = st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join)
PRINTABLE = st.text(st.characters(max_codepoint=127), max_size=30)
ANY = st.text(max_size=20)


def trivial(left: str, right: str) -> bool:
    """Whether the rules for equal and empty texts decide, on which the oracles have opinions of their own."""
    return left.strip() == right.strip() or not left.strip() or not right.strip()


@settings(deadline=None, max_examples=400)
@given(st.one_of(*(st.tuples(texts, texts) for texts in (ASCII, SENTENCES, PRINTABLE))))
def test_rouge_matches_rouge_score(texts: tuple[str, str]) -> None:
    """The F-measures of rouge-score, on any ASCII text."""
    chunk, rollout = texts
    if not trivial(chunk, rollout):
        oracle = ROUGE.score(rollout, chunk)
        for name in ("rouge1", "rougeL"):
            assert get_similarity(name)(chunk, rollout) == pytest.approx(oracle[name].fmeasure, abs=1e-12)


@settings(deadline=None, max_examples=400)
@given(st.one_of(*(st.tuples(texts, texts) for texts in (ASCII, SENTENCES, PRINTABLE))))
def test_bleu_matches_sacrebleu(texts: tuple[str, str]) -> None:
    """The sentence BLEU of sacrebleu with its own tokenizer and smoothing, on any ASCII text."""
    chunk, rollout = texts
    if not trivial(chunk, rollout):
        for order, oracle in SACREBLEU.items():
            expected = oracle.sentence_score(chunk, [rollout]).score / 100
            assert get_similarity(f"bleu{order}")(chunk, rollout) == pytest.approx(expected, abs=1e-12)


@settings(deadline=None, max_examples=200)
@given(ANY, ANY)
def test_edit_matches_the_textbook(left: str, right: str) -> None:
    """One minus the Levenshtein distance over the longer length, by the textbook's table."""
    left, right = left.strip(), right.strip()
    row = list(range(len(right) + 1))
    for i, a in enumerate(left):
        diagonal, row[0] = row[0], i + 1
        for j, b in enumerate(right):
            diagonal, row[j + 1] = row[j + 1], min(row[j + 1] + 1, row[j] + 1, diagonal + (a != b))
    expected = 1 - row[-1] / max(len(left), len(right), 1)
    assert get_similarity("edit")(left, right) == pytest.approx(expected, abs=1e-12)


@settings(deadline=None, max_examples=200)
@given(SENTENCES, SENTENCES)
def test_jaccard_matches_sets(left: str, right: str) -> None:
    """Distinct words in both over distinct words in either, with rouge-score's words."""
    if not trivial(left, right):
        words = [set(ROUGE._tokenizer.tokenize(text)) for text in (left, right)]
        expected = len(words[0] & words[1]) / max(len(words[0] | words[1]), 1)
        assert get_similarity("jaccard")(left, right) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "chunk", "rollout", "expected"),
    [
        ("edit", "kitten", "sitting", 1 - 3 / 7),
        ("edit", "abc", "xyz", 0.0),
        ("edit", "ABC", "abc", 0.0),
        ("edit", "a b", "a  b", 0.75),
        ("rouge1", "the cat sat", "the cat ran off", 4 / 7),
        ("rouge1", "the the cat", "The cat!", 4 / 5),
        ("rouge1", "sat cat the", "the cat sat", 1.0),
        ("rougeL", "sat cat the", "the cat sat", 1 / 3),
        ("rougeL", "the cat sat on", "the dog sat", 4 / 7),
        ("jaccard", "a a a b", "A c", 1 / 3),
        # One of two words, and a brevity penalty of exp(1 - 4/2).
        ("bleu1", "cat x", "the cat sat on", 0.5 * np.exp(-1)),
        # Longer than the rollout: no penalty, and of the two "cat" one counts.
        ("bleu1", "cat cat", "cat", 0.5),
        ("bleu1", "Cat", "cat", 1.0),
        # Both words, but not as a pair: sqrt(1 * 1/(2 * 1)).
        ("bleu2", "a b", "b a", 0.5**0.5),
        # Three of four words, two of three pairs.
        ("bleu2", "a b c x", "a b c d", (3 / 4 * 2 / 3) ** 0.5),
        # A single word has no pairs, and the order drops to 1; the penalty is exp(1 - 2).
        ("bleu2", "a", "a b", np.exp(-1)),
        # A word that was broken at the end of a line is one word to sacrebleu.
        ("bleu1", "co-\nop", "coop", 1.0),
        ("exact", " abc ", "abc", 1.0),
        ("exact", "ABC", "abc", 0.0),
        # Nothing but punctuation: no word in common, unless the texts are equal.
        ("rouge1", "...", "?!", 0.0),
        ("jaccard", "...", "?!", 0.0),
        ("rouge1", "...", " ...", 1.0),
        ("bleu2", "<skipped>", "<skipped>", 1.0),
        ("bleu2", "<skipped>", "<skipped> <skipped>", 0.0),
    ],
)
def test_constants(name: str, chunk: str, rollout: str, expected: float) -> None:
    """Scores worked out by hand."""
    assert get_similarity(name)(chunk, rollout) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", [*NAMES, "own"])
def test_empty_texts(name: str) -> None:
    """Two empty texts are alike, an empty one and a text are not, and white space is empty."""
    phi = get_similarity(name if name != "own" else lambda chunk, rollout: 0.5)
    for empty in ("", " ", "\n\t", "\u3000"):
        assert phi("", empty) == phi(empty, "") == 1.0
        assert phi("a", empty) == phi(empty, "a") == 0.0


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=150)
@given(left=st.one_of(ANY, SENTENCES), right=st.one_of(ANY, SENTENCES))
def test_range_identity_strip(name: str, left: str, right: str) -> None:
    """In [0, 1]; 1 for equal texts; outer white space does not matter; pairs agree with the batch."""
    phi = get_similarity(name)
    score = phi(left, right)
    assert isinstance(score, float)
    assert 0.0 <= score <= 1.0
    assert phi(left, left) == 1.0
    assert phi(f" \n{left}\t", f"\u2003{right} ") == score
    assert similarity_matrix([left, right], [[right, left], []], name) == [[score, 1.0], []]


@pytest.mark.parametrize("name", ["edit", "rouge1", "rougeL", "jaccard", "exact"])
@settings(deadline=None, max_examples=150)
@given(left=st.one_of(ANY, SENTENCES), right=st.one_of(ANY, SENTENCES))
def test_symmetry(name: str, left: str, right: str) -> None:
    """All but BLEU, whose brevity penalty looks at one side."""
    assert get_similarity(name)(left, right) == get_similarity(name)(right, left)


def test_bleu_judges_the_chunk() -> None:
    """The chunk is the hypothesis: a short chunk pays for its brevity, a short rollout does not."""
    assert get_similarity("bleu1")("a", "a b") == pytest.approx(np.exp(-1))
    assert get_similarity("bleu1")("a b", "a") == 0.5


@pytest.mark.parametrize("name", WORD_BASED)
def test_words_fold_case(name: str) -> None:
    """Case is folded for words, beyond ASCII too; `edit` and `exact` keep it."""
    phi = get_similarity(name)
    assert phi("Straße ÉTÉ Ωmega", "STRASSE été ωMEGA") == 1.0
    # Composed and decomposed accents are the same word.
    assert phi(unicodedata.normalize("NFC", "café là"), unicodedata.normalize("NFD", "Café là")) == 1.0
    assert get_similarity("edit")("Ab", "ab") == 0.5
    assert get_similarity("exact")("Ab", "ab") == 0.0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Größe, naïve!", ["grösse", "naïve"]),
        ("x_1 don't 3.5", ["x", "1", "don", "t", "3", "5"]),
        ("x_1 don’t 3.5", ["x", "1", "don", "t", "3", "5"]),  # the same, beyond ASCII
        ("答案是42。", ["答", "案", "是", "42"]),
        ("「カナ」と漢字world", ["カ", "ナ", "と", "漢", "字", "world"]),
        ("한국어 b", ["한", "국", "어", "b"]),
        ("𠀀𠀁", ["𠀀", "𠀁"]),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),  # vowel signs are marks, and part of the word
        ("می\u200cخواهم", ["می\u200cخواهم"]),  # so is the joiner inside a Persian word
        ("ශ්\u200dරී", ["ශ්\u200dරී"]),  # and the one inside a Sinhala word
        ("Привет, мир", ["привет", "мир"]),
        ("❤️ 👍🏽 — …", []),
    ],
)
def test_unicode_words(text: str, words: list[str]) -> None:
    """Runs of letters and digits of any script, CJK characters one by one, and nothing else."""
    assert similarity_module._words(text) == words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Größe, naïve-ish 3,5!", ["grösse", ",", "naïve-ish", "3,5", "!"]),
        ("答案是42。", ["答", "案", "是", "42", "。"]),
        ("«été»—oui", ["«", "été", "»", "—", "oui"]),
        ("हिन्दी।", ["हिन्दी", "।"]),
        ("ok ❤️", ["ok", "❤️"]),
    ],
)
def test_unicode_bleu_words(text: str, words: list[str]) -> None:
    """As sacrebleu on what is ASCII; CJK characters and other punctuation become words of their own."""
    assert similarity_module._bleu_words(text) == words


def test_cjk_texts_score_by_character() -> None:
    """Where rouge-score sees nothing at all, half of the characters in common is one half."""
    assert ROUGE.score("今天下雨", "今天天晴")["rouge1"].fmeasure == 0.0
    for name in ("rouge1", "rougeL"):
        assert get_similarity(name)("今天下雨", "今天天晴") == 0.5


def test_all_combining_marks_are_known() -> None:
    """The two ranges that are searched hold every mark of Unicode."""
    marks = {chr(code) for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code)).startswith("M")}
    assert marks <= set(similarity_module._marks())


# ---- names and functions --------------------------------------------------------------------------------------------


def test_unknown_name() -> None:
    """The message lists the names there are."""
    with pytest.raises(ConfigError, match="'rouge2', which is unknown") as error:
        get_similarity("rouge2")
    assert all(name in str(error.value) for name in [*NAMES, "embedding"])
    with pytest.raises(ConfigError, match="neither a name nor a function"):
        get_similarity(3)  # type: ignore[arg-type]


def test_get_similarity_of_a_result_is_the_result() -> None:
    """So a name, a function and what `get_similarity` returned can be passed alike."""
    for similarity in ("edit", lambda chunk, rollout: 0.5):
        phi = get_similarity(similarity)
        assert get_similarity(phi) is phi
        assert similarity_matrix(["a"], [["b"]], phi) == similarity_matrix(["a"], [["b"]], similarity)


def test_own_function() -> None:
    """It gets stripped texts, chunk first, and keeps its opinion on equal texts."""
    seen = []

    def own(chunk: str, rollout: str) -> float:
        seen.append((chunk, rollout))
        return len(chunk) / (len(chunk) + len(rollout))

    assert similarity_matrix([" abc ", ""], [["d\n", "abc"], ["", "x"]], own) == [[0.75, 0.5], [1.0, 0.0]]
    assert seen == [("abc", "d"), ("abc", "abc")]


async def _waits(chunk: str, rollout: str) -> float:
    return 1.0


@pytest.mark.parametrize(
    ("function", "why"),
    [(lambda chunk: 1.0, "too many"), (lambda a, b, *, c: 1.0, "missing a required"), (_waits, "it is asynchronous")],
)
def test_own_function_is_not_called_with_two_texts(function: Any, why: str) -> None:
    """Said before a teacher is asked. A function in C need not have a signature."""
    with pytest.raises(ConfigError, match=rf"cannot be called with two texts: {why}.*f\(chunk, rollout\)"):
        get_similarity(function)
    assert get_similarity(max)  # type: ignore[type-var]


@pytest.mark.parametrize("value", [True, 1, np.float32(0.25), np.float64(1.0), 1 + 1e-7, -1e-7, np.array(0.5)])
def test_own_function_returns_any_number(value: Any) -> None:
    """Whatever is a number counts, and rounding is forgiven."""
    assert get_similarity(lambda chunk, rollout: value)("a", "b") == min(max(float(value), 0.0), 1.0)


@pytest.mark.parametrize("value", [1.01, -0.5, float("nan"), float("inf"), None, "0.5", [0.5, 0.5], 85])
def test_own_function_returns_nonsense(value: Any) -> None:
    """The message names the value and the texts."""
    with pytest.raises(ConfigError, match="for 'left' and 'right', but a similarity is a finite number") as error:
        get_similarity(lambda chunk, rollout: value)("left", "right")
    assert repr(value) in str(error.value)


# ---- batches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*NAMES, "own"])
def test_ragged_rows(name: str) -> None:
    """Rows keep their order and length, also when all are empty."""
    similarity: str | Callable[[str, str], float] = name if name != "own" else lambda chunk, rollout: 0.25
    chunks = ["the cat sat", "b", "", "on the mat"]
    rollouts = [["the cat", "", "a dog"], [], ["", "x"], ["on the mat today"]]
    phi = get_similarity(similarity)
    expected = [[phi(chunk, rollout) for rollout in row] for chunk, row in zip(chunks, rollouts, strict=True)]
    assert similarity_matrix(chunks, rollouts, similarity) == expected
    assert similarity_matrix([], [], similarity) == []
    assert similarity_matrix(["a", "b"], [[], []], similarity) == [[], []]


def test_one_row_for_each_chunk() -> None:
    """A missing row is an error, not a shift of all that follow."""
    with pytest.raises(ConfigError, match="2 chunks and 1 lists"):
        similarity_matrix(["a", "b"], [["a"]], "edit")


def test_each_distinct_text_is_prepared_once() -> None:
    """Teachers repeat themselves; a text is cut into words once for the whole batch."""
    prepared: list[str] = []

    def prepare(texts: list[str]) -> list[str]:
        prepared.extend(texts)
        return texts

    phi = similarity_module._Named(prepare, lambda chunks, rollouts: [0.5] * len(chunks))
    similarity_matrix(["a", "b"], [["x", " x", "y"], ["x", "b", ""]], phi)
    assert sorted(prepared) == ["a", "b", "x", "y"]


def test_a_batch_is_fast() -> None:
    """Eight trajectories of the paper's 10 chunks and 10 rollouts take a fraction of a second with any function."""
    words = [f"w{i * i % 97}" for i in range(2_000)]
    text = [" ".join(words[i : i + 40]) for i in range(960)]
    chunks = text[:80]
    rollouts = [text[80 + 10 * i : 90 + 10 * i] for i in range(80)]
    for name in NAMES:
        seconds = []
        for _ in range(3):  # other processes share the caches
            begin = time.process_time()
            similarity_matrix(chunks, rollouts, name)
            seconds.append(time.process_time() - begin)
        assert min(seconds) < 0.5, name


# ---- embeddings -----------------------------------------------------------------------------------------------------


@pytest.fixture
def encoder(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A stand-in for sentence-transformers whose vectors are chosen here."""
    log = SimpleNamespace(models=[], batches=[])
    vectors = {
        "east": [2.0, 0.0],
        "north": [0.0, 3.0],
        "northeast": [1.0, 1.0],
        "west": [-1.0, 0.0],
        "void": [0.0, 0.0],
    }

    class SentenceTransformer:
        def __init__(self, model: str) -> None:
            log.models.append(model)

        def encode(self, texts: list[str], **options: Any) -> Any:
            log.batches.append(texts)
            return np.array([vectors[text] for text in texts], np.float32)

    similarity_module._embedding.cache_clear()
    monkeypatch.setitem(
        sys.modules,
        "sentence_transformers",
        SimpleNamespace(SentenceTransformer=SentenceTransformer),  # type: ignore[arg-type]
    )
    yield log
    similarity_module._embedding.cache_clear()


def test_embedding_is_the_cosine(encoder: SimpleNamespace) -> None:
    """Cosine of the vectors whatever their length, 0 where it is negative or there is none."""
    (row,) = similarity_matrix(["east"], [["east", "northeast", "north", "west", "void", ""]], "embedding")
    assert row == pytest.approx([1.0, 0.5**0.5, 0.0, 0.0, 0.0, 0.0])


def test_embedding_encodes_in_one_batch_with_one_model(encoder: SimpleNamespace) -> None:
    """Each distinct text goes through the model once, and the model is loaded once."""
    similarity_matrix(["east", "north"], [["west", "north"], ["west", "east"]], "embedding")
    similarity_matrix(["east"], [["west"]], get_similarity("embedding"))
    assert [sorted(batch) for batch in encoder.batches] == [["east", "north", "west"], ["east", "west"]]
    assert encoder.models == ["sentence-transformers/all-MiniLM-L6-v2"]
    get_similarity("embedding", embedding_model="my/model")
    assert encoder.models[1:] == ["my/model"]


def test_embedding_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pip command is printed when the function is asked for, not at the first batch."""
    similarity_module._embedding.cache_clear()
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)  # type: ignore[arg-type]
    with pytest.raises(MissingExtraError, match=r"pip install -e '\.\[embedding\]'"):
        get_similarity("embedding")


def test_embedding_of_a_real_model(tiny_model_dir: Path) -> None:
    """The real sentence-transformers is called as it wants to be called."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    texts = ["Tom has 3 apples", "Tom buys 4 apples", "Answer: 7"]
    vectors = sentence_transformers.SentenceTransformer(str(tiny_model_dir)).encode(texts)
    expected = [max(0.0, float(sentence_transformers.util.cos_sim(vectors[0], vector))) for vector in vectors[1:]]
    phi = get_similarity("embedding", embedding_model=str(tiny_model_dir))
    assert similarity_matrix(texts[:1], [texts[1:]], phi) == [pytest.approx(expected, abs=1e-5)]
