# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""From a trajectory to posteriors: what the teacher is asked, how its rollouts are cut, and what is dropped."""

import asyncio
import functools
import itertools
import math
import threading
import time
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from benchmarks.first_rollouts import expected
from omniopd_trl.audits import event_loop
from omniopd_trl.audits.alignment import DECODING_CONTEXT, Alignment
from omniopd_trl.audits.auditor import Auditor
from omniopd_trl.audits.event_loop import EventLoopThread
from omniopd_trl.audits.types import Audit, Branch, PolicyScores, Trajectory
from omniopd_trl.demo import asset_path
from omniopd_trl.errors import ConfigError, TeacherError
from omniopd_trl.journal.resume import audit_or_replay
from omniopd_trl.method.chunks import Chunk
from omniopd_trl.method.similarity import get_similarity
from omniopd_trl.teachers import Prefix, Rollout, SamplingRequest, ScriptedTeacher, Teacher, TeacherReply, Usage
from omniopd_trl.teachers.remote.answers import Sample
from omniopd_trl.teachers.remote.settings import Capabilities
from tests.support.audits import audit_settings
from tests.support.corpus import STUDENT_LINES
from tests.support.journals import journal
from tests.support.judge import judge, numbered
from tests.support.other_tokenizers import channels, llama_2, llama_style_tokenizer, metaspace, word_piece
from tests.support.services import FINAL, Scripted

SETTINGS = audit_settings(teacher_temperature=0.8, teacher_top_p=0.9)


class Recorder(Teacher):
    """Answers from a script and keeps what it was asked."""

    name = "recorder"

    def __init__(self, script):
        self.inner = ScriptedTeacher(script)
        self.calls: list[tuple[list[Prefix], SamplingRequest]] = []

    async def sample(self, prefixes, request):
        self.calls.append((list(prefixes), request))
        return await self.inner.sample(prefixes, request)


def auditor(tokenizer, teacher, **overrides) -> Auditor:
    return Auditor(teacher, tokenizer, replace(SETTINGS, **overrides), get_similarity("edit"))


def trajectory(tokenizer, text: str, peaks: dict[int, float], **overrides) -> tuple[Trajectory, PolicyScores]:
    """A trajectory that writes `text`, with entropy 0.1 but for the peaks, and probability 1/2 for each token."""
    token_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    entropy = torch.full((len(token_ids),), 0.1)
    for position, value in peaks.items():
        entropy[position] = value
    logprobs = torch.full((len(token_ids),), math.log(0.5))
    return Trajectory("What?", [], token_ids, **overrides), PolicyScores(logprobs, entropy, logprobs)


def cut(judge: Auditor, text: str, rollouts: list[Rollout]) -> tuple[list[str], int]:
    """Rollouts cut to the length of a text of the student, and how many are short."""
    ids = judge.alignment.tokenizer(text, add_special_tokens=False)["input_ids"]
    (texts,), num_short = judge.alignment.cut(ids, [Chunk(0, len(ids), 0)], [text], [rollouts])
    return texts, num_short


def test_one_audit_by_hand(tiny_tokenizer):
    """Two chunks, three rollouts each: prefixes, similarities, prior and posterior as computed on paper."""
    text = "abcdefghijklmnop"  # one token for each letter
    path = trajectory(tiny_tokenizer, text, {3: 2.0, 9: 1.0}, seed=11)
    assert len(path[0].completion_ids) == 16
    teacher = Recorder(["defg", "dexy", ""])
    audit = asyncio.run(auditor(tiny_tokenizer, teacher).audit(*path))

    [(prefixes, request)] = teacher.calls
    assert prefixes == [Prefix("What?", "abc"), Prefix("What?", "abcdefghi")]
    assert request == SamplingRequest(num_samples=3, max_tokens=6, temperature=0.8, top_p=0.9, seed=11)
    first, second = audit.chunks
    assert (first.chunk, first.text) == (Chunk(3, 7, 3), "defg")
    assert (second.chunk, second.text) == (Chunk(9, 13, 9), "jklm")
    assert first.similarities == pytest.approx((1.0, 0.5, 0.0))
    assert second.similarities == pytest.approx((0.0, 0.0, 0.0))
    assert first.prior == pytest.approx(0.5)
    assert second.prior == pytest.approx(0.5)
    assert first.posterior == pytest.approx((1.5 + 0.5) / 4)
    assert second.posterior == pytest.approx(0.5 / 4)
    assert first.mean_similarity == pytest.approx(0.5)
    assert (audit.num_dropped, audit.num_rollouts, audit.num_short, audit.failures) == (0, 6, 0, ())


# ---- Rollouts that are not requested ----


def sure(prefix, index):
    """After the first chunk's prefix, texts that are equal as far as the chunk reaches."""
    return f"defg{'tuvw'[index]}" if prefix.completion == "abc" else ("jklm", "jkxx")[index]


@pytest.mark.parametrize("refuses", [False, True], ids=["equal", "one is missing"])
def test_first_rollouts_that_are_equal_are_all(tiny_tokenizer, refuses):
    """By hand: the rest is requested for the other chunk only, with another seed, and n is what was obtained."""
    path = trajectory(tiny_tokenizer, "abcdefghijklmnop", {3: 2.0, 9: 1.0}, seed=11)
    teacher = Recorder(lambda prefix, index: None if refuses and index == 0 else sure(prefix, index))
    settings = {"num_rollouts": 4, "first_rollouts": 2}
    audit = asyncio.run(auditor(tiny_tokenizer, teacher, **settings).audit(*path))
    asked = [([p.completion for p in prefixes], r.num_samples, r.seed) for prefixes, r in teacher.calls]
    assert asked[0] == (["abc", "abcdefghi"], 2, 11)
    assert asked[1:] == [(["abc", "abcdefghi"] if refuses else ["abcdefghi"], 2, 13)]
    first, second = audit.chunks
    assert first.rollouts == ("defg", "defg")
    assert first.posterior == pytest.approx((2 + 0.5) / 3)
    assert second.similarities == pytest.approx((0.5, 0.5) if refuses else (1, 0.5, 1, 0.5))
    assert second.posterior == pytest.approx((1 + 0.5) / 3 if refuses else (3 + 0.5) / 5)
    assert (audit.num_dropped, audit.num_rollouts) == (0, 4 if refuses else 6)
    failure = "the script refused 1 of 2; the script refused 1 of 2"
    assert audit.failures == ((failure, failure) if refuses else ())


def test_bias_of_stopping(tiny_tokenizer):
    """Over all answers of a teacher with two texts, exactly: the formulas of `benchmarks.first_rollouts`."""
    path = trajectory(tiny_tokenizer, "abcdefgh", {3: 2.0})
    share, first, most = 0.3, 2, 4
    mean = rollouts = squares = 0.0
    for answers in itertools.product(("defg", "wxyz"), repeat=most):
        left = iter(answers)
        teacher = ScriptedTeacher(lambda prefix, index, left=left: next(left))
        settings = {"num_chunks": 1, "num_rollouts": most, "first_rollouts": first}
        audit = asyncio.run(auditor(tiny_tokenizer, teacher, **settings).audit(*path))
        probability = math.prod(share if text == "defg" else 1 - share for text in answers)
        mean += probability * audit.chunks[0].mean_similarity
        rollouts += probability * audit.num_rollouts
        squares += probability * (audit.chunks[0].mean_similarity - share) ** 2
    # Ten recorded rollouts with these shares.
    formula = expected(["defg"] * 3 + ["wxyz"] * 7, [1.0] * 3 + [0.0] * 7, first, most)
    assert rollouts == pytest.approx(formula.rollouts)
    assert mean - share == pytest.approx(formula.bias)
    assert abs(formula.bias) > 0.02
    assert squares == pytest.approx(formula.squared_error)


class Sure(Scripted):
    """One sample for each request, which its seed decides; the same one after the first chunk's prefix."""

    def __init__(self, **settings):
        super().__init__(most=1, capabilities=Capabilities("raw"), **settings)

    async def request(self, prefix, num_samples, request):
        response = await super().request(prefix, num_samples, request)
        text = "defg" if prefix.completion == "abc" else f"jk{request.seed:02}"[-4:]
        return response._replace(samples=(Sample(text),))


def test_a_resumed_audit_requests_what_the_rule_still_wants(tmp_path, tiny_tokenizer):
    """Stopped after each request in turn: every rollout is paid once, and the audit is the same."""
    path, scores = trajectory(tiny_tokenizer, "abcdefghijklmnop", {3: 2.0, 9: 1.0}, seed=11)

    def run(folder, teacher):
        settings = {"num_rollouts": 5, "first_rollouts": 2}
        with journal(folder) as records:
            if records.trajectories(0) is None:
                records.record_trajectories(0, [path])
            auditing = auditor(tiny_tokenizer, teacher, **settings)
            asyncio.run(audit_or_replay(auditing, path, scores, records, 0, 0))
            return records.audit(0, 0), [(text, request.seed) for text, _, request in teacher.seen]

    expected, requests = run(tmp_path / "clean", Sure())
    assert [len(chunk.rollouts) for chunk in expected.chunks] == [2, 5]
    assert len(set(requests)) == len(requests) == 7
    for stop in range(len(requests)):
        first = Sure(fault=lambda number, _, stop=stop: FINAL if number >= stop else None)
        with pytest.raises(TeacherError, match="refused"):
            run(tmp_path / str(stop), first)
        audit, rest = run(tmp_path / str(stop), Sure())
        assert audit.chunks == expected.chunks
        assert sorted(requests[:stop] + rest) == sorted(requests)


class Timed(Scripted):
    """A service whose answers take a while, with a time limit."""

    async def request(self, prefix, num_samples, request):
        response = await super().request(prefix, num_samples, request)
        return response._replace(samples=tuple(Sample("defg") for _ in response.samples))


def computes(seconds):
    """Take this long without releasing the interpreter, as a similarity in plain Python does."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


class Slow:
    """A tokenizer that takes a while to encode, and a similarity of 0.5 that takes a while."""

    def __init__(self, tokenizer, waits, encoding, similarity):
        self.tokenizer, self.waits, self.seconds = tokenizer, waits, (encoding, similarity)
        self.decode = tokenizer.decode
        self.threads = []

    def __call__(self, texts, **kwargs):
        self.threads.append(threading.current_thread().name)
        self.waits(self.seconds[0])
        return self.tokenizer(texts, **kwargs)

    def similarity(self, chunk, rollout):
        self.threads.append(threading.current_thread().name)
        self.waits(self.seconds[1])
        return 0.5


@pytest.mark.case("A4")
@pytest.mark.parametrize(
    ("waits", "encoding", "similarity"),
    [(time.sleep, 0, 0.15), (computes, 0, 0.15), (time.sleep, 0.9, 0)],  # 0.9 s for a trajectory
    ids=["similarity", "similarity in Python", "tokenizer"],
)
def test_slow_scores_do_not_delay_requests(tiny_tokenizer, waits, encoding, similarity):
    """While one trajectory is scored, the answers for others arrive: none times out, and none is requested twice."""
    slow = Slow(tiny_tokenizer, waits, encoding, similarity)
    teacher = Timed(delay=lambda prefix: 0.01 * len(prefix.prompt), timeout=0.6, max_attempts=3)
    judge = Auditor(teacher, slow, SETTINGS, get_similarity(slow.similarity))
    paths = [trajectory(tiny_tokenizer, "abcdefghijklmnop", {3: 2.0, 9: 1.0}) for _ in range(2)]
    # The second one is answered after the first one has begun to be scored.
    paths = [(replace(path, prompt="What?" * (1 + 3 * i)), scores) for i, (path, scores) in enumerate(paths)]
    loop = EventLoopThread()
    audits = [future.result() for future in loop.submit(*(judge.audit(*path) for path in paths))]
    loop.close()
    assert len(teacher.seen) == 2 * 2
    assert [[chunk.similarities for chunk in audit.chunks] for audit in audits] == [[(0.5, 0.5, 0.5)] * 2] * 2
    assert {name.rpartition("_")[0] for name in slow.threads} == {"omniopd-scoring"}
    assert [len(set(audit.failures)) for audit in audits] == [0, 0]


class FailsFor:
    """A tokenizer that cannot encode some texts, like a fast tokenizer with a lone surrogate."""

    def __init__(self, tokenizer, text):
        self.tokenizer, self.text = tokenizer, text
        self.decode = tokenizer.decode

    def __call__(self, texts, **kwargs):
        if any(self.text in text for text in texts):
            raise TypeError("TextEncodeInput must be Union[TextInputSequence, Tuple[InputSequence, InputSequence]]")
        return self.tokenizer(texts, **kwargs)


def divides_by_words(chunk, rollout):
    return 1.0 / len([word for word in rollout.split() if word.isalpha()])


@pytest.mark.case("T9")
@pytest.mark.parametrize(
    ("bad", "fails_for", "phi", "what"),
    [
        ("\ufffd", "\ufffd", "edit", "encoded with the student's tokenizer (TypeError: TextEncode"),
        ("odd", "odd", "edit", "encoded with the student's tokenizer (TypeError: TextEncode"),
        ("...", None, divides_by_words, "scored by the similarity (ZeroDivisionError: "),
        ("\x00" * 9, None, divides_by_words, "scored by the similarity (ZeroDivisionError: "),
    ],
)
def test_a_rollout_that_cannot_be_scored_is_set_aside(tiny_tokenizer, caplog, bad, fails_for, phi, what):
    """The others count as they would without it; it is counted and quoted, and not a word of it reaches a number."""
    tokenizer = tiny_tokenizer if fails_for is None else FailsFor(tiny_tokenizer, fails_for)
    path = trajectory(tiny_tokenizer, "abcdefghijklmnop", {3: 2.0, 9: 1.0}, seed=11)
    audits = []
    for script in (["defg", bad, "dexy"], ["defg", "dexy"]):
        judge = Auditor(ScriptedTeacher(script), tokenizer, SETTINGS, get_similarity(phi))
        judge.settings = replace(judge.settings, num_rollouts=len(script))
        audits.append(asyncio.run(judge.audit(*path)))
    assert audits[0].chunks == audits[1].chunks
    assert [audit.num_set_aside for audit in audits] == [2, 0]
    assert audits[0].num_rollouts == 4
    assert what in audits[0].failures[0]
    warnings = [record.getMessage() for record in caplog.records if "set aside" in record.getMessage()]
    assert len(warnings) == 1
    assert what in warnings[0]
    assert repr(bad)[1:-1] in warnings[0]


@pytest.mark.case("T9")
def test_nothing_can_be_encoded(tiny_tokenizer):
    """Chunks without a rollout are dropped: the run's own limit ends it, not a traceback at every resumption."""
    path = trajectory(tiny_tokenizer, "abcdefghijklmnop", {3: 2.0, 9: 1.0})
    audit = asyncio.run(auditor(FailsFor(tiny_tokenizer, "odd"), ScriptedTeacher(["odd"])).audit(*path))
    assert (audit.chunks, audit.num_dropped, audit.num_set_aside) == ((), 2, 6)
    assert "TypeError" in audit.failures[0]


@pytest.mark.parametrize(
    ("phi", "error"),
    [
        (lambda chunk, rollout: chunk.nonsense(), AttributeError),
        (lambda chunk, rollout: chunk + 1, TypeError),
        (lambda chunk, rollout: float("nan"), ConfigError),
        (lambda chunk, rollout: 2.0 if rollout == "dexy" else 1.0, ConfigError),  # one is enough: it is no number
    ],
)
def test_a_bug_in_a_similarity_is_raised(tiny_tokenizer, phi, error):
    """One that fails for every rollout, or returns no similarity, is not a matter of a text."""
    path = trajectory(tiny_tokenizer, "abcdefghijklmnop", {3: 2.0, 9: 1.0})
    judge = auditor(tiny_tokenizer, ScriptedTeacher(["defg", "dexy"]))
    judge.similarity = get_similarity(phi)
    with pytest.raises(error):
        asyncio.run(judge.audit(*path))


def test_rollouts_are_cut_to_the_chunk_in_student_tokens(tiny_tokenizer):
    """A rollout that continues is cut, one that ended by itself stays, one that was cut off too soon is counted."""
    judge = auditor(tiny_tokenizer, ScriptedTeacher(["x"]))
    rollouts = [Rollout("abcdefgh"), Rollout("ab"), Rollout("abc", "length"), Rollout("abcdef", "length")]
    assert cut(judge, "wxyz", rollouts) == (["abcd", "ab", "abc", "abcd"], 1)
    assert cut(judge, "wxyz", []) == ([], 0)
    words = " First we add 3 and 4. So Tom has 7 apples."
    ids = tiny_tokenizer(words, add_special_tokens=False)["input_ids"]
    assert len(ids) < len(words), "no token is longer than a character: the test shows nothing"
    assert cut(judge, " wxyz", [Rollout(words)])[0] == [tiny_tokenizer.decode(ids[:5])]


LINES = " ".join(STUDENT_LINES)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(llama_2, id="normalizer"),
        pytest.param(lambda: llama_style_tokenizer(None), id="metaspace"),
        pytest.param(None, id="byte-level"),
        pytest.param(lambda: AutoTokenizer.from_pretrained(asset_path("student")), id="demo"),
    ],
)
def test_a_teacher_that_writes_the_students_own_text_is_exact(make, tiny_tokenizer):
    """At every position: whatever a tokenizer puts before a text by itself, the same words are the same chunk."""
    tokenizer = tiny_tokenizer if make is None else make()
    ids = tokenizer(LINES, add_special_tokens=False)["input_ids"]
    judge, exact = auditor(tokenizer, ScriptedTeacher(["x"])), get_similarity("exact")
    wrong = []
    for start in range(1, len(ids) - 16):
        chunk = Chunk(start, start + 8, start)
        prefix, text = judge.alignment.split_texts(ids, [chunk])[0]
        continues = tokenizer.decode(ids, clean_up_tokenization_spaces=False)[len(prefix) :]
        # Some services trim the continuation. One that was cut off at the chunk's end is not short.
        rollouts = [
            Rollout(written, "length") for written in (continues, continues.lstrip(), text, "\n" + continues.lstrip())
        ]
        (texts,), short = judge.alignment.cut(ids, [chunk], [text], [rollouts])
        if any(exact(text, rollout) != 1.0 for rollout in texts) or short:
            wrong.append((text, texts))
        assert texts[0] == text
        # One that was cut off within the chunk is.
        shorter = judge.alignment.split_texts(ids, [Chunk(start, start + 6, start)])[0][1]
        assert judge.alignment.cut(ids, [chunk], [text], [[Rollout(shorter, "length")]])[1] == 1
    assert wrong == []
    assert len(ids) > 48, "too few positions"


@pytest.mark.parametrize("make", [llama_2, None], ids=["llama-2", "byte-level"])
def test_tokens_without_a_text_count(make, tiny_tokenizer):
    """The student ends its turn, or writes bytes that are no characters: a teacher that continues differs from it."""
    tokenizer = tiny_tokenizer if make is None else make()
    ids = tokenizer(LINES, add_special_tokens=False)["input_ids"]
    judge = auditor(tokenizer, ScriptedTeacher(["x"]))
    chunk = Chunk(20, 28, 20)
    continuation = tokenizer.decode(ids)[len(judge.alignment.split_texts(ids, [chunk])[0][0]) :]
    *_, first, second, _ = tokenizer("漢", add_special_tokens=False)["input_ids"]
    for tokens in ([tokenizer.eos_token_id], [first] * 4, [first, second]):
        written = [*ids[: 28 - len(tokens)], *tokens]
        text = judge.alignment.split_texts(written, [chunk])[0][1]
        rollouts = [[Rollout(text), Rollout(continuation)]]
        ((ended, continued),), _ = judge.alignment.cut(written, [chunk], [text], rollouts)
        assert ended == text
        assert continued == judge.alignment.split_texts(ids, [chunk])[0][1] != text


def test_other_tokens_than_the_tokenizers_count_as_they_are(tiny_tokenizer):
    """A student may write letter by letter: the chunk's own number of tokens is what a rollout may have."""
    letters = [i for letter in "Tom has 12 apples" for i in tiny_tokenizer(letter)["input_ids"]]
    ids = tiny_tokenizer(LINES, add_special_tokens=False)["input_ids"]
    assert len(letters) > len(tiny_tokenizer("Tom has 12 apples")["input_ids"]) + 4
    judge = auditor(tiny_tokenizer, ScriptedTeacher(["x"]))
    chunk = Chunk(0, len(letters), 0)
    (rollout,), _ = judge.alignment.cut(letters, [chunk], ["Tom has 12 apples"], [[Rollout(LINES)]])
    assert rollout == [tiny_tokenizer.decode(ids[: len(letters)])]


@pytest.mark.parametrize("make", [llama_2, None], ids=["llama-2", "byte-level"])
def test_a_chunk_that_begins_inside_a_character(make, tiny_tokenizer):
    """Its text begins with the whole character, and so does a rollout of as many tokens."""
    tokenizer = tiny_tokenizer if make is None else make()
    text = "Tom has 漢字 is 12 apples and 😀 so on"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    judge = auditor(tokenizer, ScriptedTeacher(["x"]))
    for start in range(len(ids) - 10):
        chunk = Chunk(start, start + 8, start)
        prefix, expected = judge.alignment.split_texts(ids, [chunk])[0]
        rollouts = [Rollout(text[len(prefix) :]), Rollout(text[len(prefix) :].lstrip())]
        (texts,), _ = judge.alignment.cut(ids, [chunk], [expected], [rollouts])
        assert [rollout.strip() for rollout in texts] == [expected.strip()] * 2


def test_white_space_before_a_rollout_does_not_move_its_end(tiny_tokenizer):
    """It stays in the text. A chunk that is nothing but white space is another chunk than a text after white space."""
    judge = auditor(tiny_tokenizer, ScriptedTeacher(["x"]))
    for chunk in ("\n\nTom has 3", " apples and", "es and pears"):
        texts, _ = cut(judge, chunk, [Rollout(space + LINES) for space in ("", " ", "\n", "\n\n  ")])
        (end,) = {text.lstrip() for text in texts}
        assert LINES.startswith(end)
        assert texts == [space + end for space in ("", " ", "\n", "\n\n  ")]
    texts, _ = cut(judge, "\n" * 8, [Rollout(LINES), Rollout("\n" * 20)])
    assert texts[0].strip()
    assert not texts[1].strip()
    assert cut(judge, "Tom has", [Rollout(" \n")])[0] == [" \n"]


def test_a_chunk_without_rollouts_is_dropped_and_fewer_rollouts_divide_by_what_came(tiny_tokenizer):
    """Refusals are outcomes: n counts the rollouts that really came back."""

    def script(prefix: Prefix, index: int) -> str | None:
        if prefix.completion == "abc":
            return None
        return "jklm" if index == 0 else None

    path = trajectory(tiny_tokenizer, "abcdefghijklmnop", {3: 2.0, 9: 1.0})
    audit = asyncio.run(auditor(tiny_tokenizer, ScriptedTeacher(script)).audit(*path))
    [chunk] = audit.chunks
    assert chunk.chunk.start == 9
    assert chunk.posterior == pytest.approx((1.0 + 0.5) / 2)
    assert (audit.num_dropped, audit.num_rollouts) == (1, 1)
    assert len(audit.failures) == 2


def test_a_trajectory_without_chunks_asks_nothing(tiny_tokenizer):
    """Shorter than the shortest chunk: no request, no cost."""
    teacher = Recorder(["x"])
    assert asyncio.run(auditor(tiny_tokenizer, teacher).audit(*trajectory(tiny_tokenizer, "a", {}))) == Audit()
    assert teacher.calls == []


def test_a_trajectory_whose_anchors_are_all_certain_asks_nothing(tiny_tokenizer):
    """With `min_anchor_entropy`, a trajectory may have no chunk. The teacher is not asked, and all is un-audited."""
    teacher = Recorder(["x"])
    written = trajectory(tiny_tokenizer, "First we add 3 and 4.", {2: 0.75})
    gated = auditor(tiny_tokenizer, teacher, min_anchor_entropy=0.75)
    assert asyncio.run(gated.audit(*written)) == Audit()
    assert teacher.calls == []
    [chunk] = asyncio.run(auditor(tiny_tokenizer, teacher, min_anchor_entropy=0.5).audit(*written)).chunks
    assert chunk.chunk.anchor == 2


def test_the_most_diverse_candidates_become_forks(tiny_tokenizer):
    """Of four candidates two are kept. Equally diverse ones are taken by the entropy at their anchors."""
    written, scores = trajectory(tiny_tokenizer, "abcdefghijklmnopqrstuvwx", {2: 1.0, 8: 4.0, 14: 2.0, 20: 3.0})
    settings = {"num_chunks": 2, "fork_candidates": 4, "chunk_length": 4, "min_chunk_length": 4}
    judge = auditor(tiny_tokenizer, ScriptedTeacher(["x"]), chunk_placement="center", num_branches=1, **settings)
    chunks = judge.candidates(written, scores)
    assert [chunk.anchor for chunk in chunks] == [2, 8, 14, 20]
    assert [chunk.anchor for chunk in judge.select(written, scores)] == [8, 20]
    ids = written.completion_ids
    branches = [[Branch(tuple(ids[c.start : c.end][:: 1 if c.anchor == 8 else -1]), "")] for c in chunks]
    forks = judge.forks(written, scores, chunks, branches)
    assert [(fork.chunk.anchor, fork.diversity) for fork in forks] == [(14, 0.5), (20, 0.5)]
    assert forks[0].branches[1].text == tiny_tokenizer.decode(ids[14 - 2 : 14 + 2][::-1])


def test_a_branch_that_ended_is_compared_with_whole_rollouts(tiny_tokenizer):
    """Not with rollouts of its own length, which would pay the student for ending early. Agreed forks ask nothing."""
    written, scores = trajectory(tiny_tokenizer, "First we add 3 and 4.", {})
    ids = written.completion_ids
    chunk, same = Chunk(5, 9, 5), Chunk(0, 4, 0)
    text = tiny_tokenizer.decode(ids[5:9])
    teacher = Recorder([text])
    judge = auditor(tiny_tokenizer, teacher, num_rollouts=1)
    ended = Branch((ids[5], tiny_tokenizer.eos_token_id), "")
    forks = judge.forks(written, scores, [same, chunk], [[Branch(tuple(ids[:4]), "")], [ended]])
    audit = asyncio.run(judge.audit(replace(written, forks=forks), scores))
    [audited] = audit.chunks
    own, short = audited.branches
    assert (own.text, short.text) == (text, tiny_tokenizer.decode(ids[5:6]))
    assert own.similarity == 1
    assert short.similarity == pytest.approx(len(short.text.strip()) / len(text.strip()))
    assert [own.advantage, -short.advantage] == pytest.approx([1 - short.similarity] * 2)
    assert audit.agreed == (same,)
    [(prefixes, _)] = teacher.calls
    assert [prefix.completion for prefix in prefixes] == [tiny_tokenizer.decode(ids[:5])]


def test_a_judge_is_not_told_which_branch_is_the_trajectorys(tiny_tokenizer):
    """The candidates of a fork are in alphabetical order."""
    written, scores = trajectory(tiny_tokenizer, "abcdefghijklmnop", {})
    ids, chunk = written.completion_ids, Chunk(8, 12, 8)
    teacher = Recorder(judge)
    marking = auditor(tiny_tokenizer, teacher, signal="judge")
    forks = marking.forks(written, scores, [chunk], [[Branch(tuple(ids[start : start + 4]), "") for start in (12, 0)]])
    [audited] = asyncio.run(marking.audit(replace(written, forks=forks), scores)).chunks
    assert [branch.text for branch in audited.branches] == ["ijkl", "mnop", "abcd"]
    [([question], _)] = teacher.calls
    assert numbered(question.prompt[1]["content"], "candidate") == {1: "abcd", 2: "ijkl", 3: "mnop"}


def test_prefix_and_chunk_never_split_a_character(tiny_tokenizer):
    """Borders inside a character of several bytes: texts without replacement characters that join to the whole."""
    text = "x = 漢字 é 😀 end"
    ids = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
    judge = auditor(tiny_tokenizer, ScriptedTeacher(["x"]))
    assert len(ids) > len(text), "no character is split over tokens: the test shows nothing"
    for start in range(len(ids)):
        for end in range(start + 1, len(ids) + 1):
            prefix, chunk = judge.alignment.split_texts(ids, [Chunk(start, end, start)])[0]
            assert "\ufffd" not in prefix + chunk
            assert text.startswith(prefix + chunk)
    assert judge.alignment.split_texts(ids, [Chunk(0, len(ids), 0)])[0] == ("", text)


class Counting:
    """A tokenizer that notes how many tokens it decodes at a time."""

    def __init__(self, tokenizer):
        self.tokenizer, self.decoded = tokenizer, []

    def decode(self, token_ids, **kwargs):
        self.decoded.append(len(token_ids))
        return self.tokenizer.decode(token_ids, **kwargs)


TOKENIZERS = {"llama-2": llama_2, "metaspace": metaspace, "word-piece": word_piece}
TOKENIZERS = {name: functools.cache(make) for name, make in TOKENIZERS.items()}
WRITTEN = st.sampled_from(
    [" Tom has", "12", ".", "\n", "é", "漢字", "漢字漢字漢字", "😀😀😀", "the angles aren't", "s"]
)


@pytest.mark.parametrize("name", ["byte-level", *TOKENIZERS])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_incremental_texts_are_those_of_whole_decoding(tiny_tokenizer, name, data):
    """Whatever a student writes: at every cut the text is that of all tokens before it, and prefix and chunk join.

    Characters may be cut anywhere, bytes need not be characters, and special tokens may stand anywhere.
    """
    tokenizer = tiny_tokenizer if name == "byte-level" else TOKENIZERS[name]()
    one = st.integers(0, len(tokenizer) - 1).map(lambda token: [token])
    text = WRITTEN.map(lambda written: tokenizer(written, add_special_tokens=False)["input_ids"])
    pieces = st.one_of(one, st.sampled_from(tokenizer.all_special_ids).map(lambda token: [token]), text, text)
    drawn = data.draw(st.lists(st.one_of(pieces, pieces.map(lambda tokens: tokens[:-1])), max_size=12))
    ids = [token for tokens in drawn for token in tokens]
    assume(ids)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(ids)), min_size=2, max_size=12)) | {len(ids)})
    chunks = [Chunk(start, end, start) for start, end in itertools.pairwise(cuts)]

    def whole(end):
        text = tokenizer.decode(ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text.rstrip("\ufffd")

    texts = auditor(tokenizer, ScriptedTeacher(["x"])).alignment.split_texts(ids, chunks)
    for chunk, (prefix, text) in zip(chunks, texts, strict=True):
        assert prefix + text == whole(chunk.end)
        assert whole(chunk.start).startswith(prefix)
        assert prefix == whole(chunk.start) or not whole(chunk.end).startswith(whole(chunk.start))


def test_decoders_that_look_further_than_their_neighbours(tiny_tokenizer):
    """Of Llama 2, one wrong byte spoils all bytes beside it, and each text is decoded whole; otherwise none is."""
    text = "Tom has 漢字漢字漢字 and"
    for tokenizer, falls_back in ((tiny_tokenizer, False), (llama_2(), True)):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        ends = list(range(2, len(ids)))
        counting = Counting(tokenizer)
        pairs = Alignment(counting).split_texts(ids, [Chunk(*cut, cut[0]) for cut in itertools.pairwise(ends)])
        assert [text.startswith(prefix + chunk) for prefix, chunk in pairs] == [True] * len(pairs)
        assert (counting.decoded[-len(ends) :] == ends) == falls_back
        if not falls_back:
            assert len(counting.decoded) == 2 * len(ends) + 1
            assert max(counting.decoded[:-1]) <= DECODING_CONTEXT + 3  # the last one is the check of all


def test_merged_chunks_ask_for_as_many_tokens_as_the_longest_needs(tiny_tokenizer):
    """Windows that touch become one longer chunk, and the rollouts are as long."""
    teacher = Recorder(["defghijk"])
    path = trajectory(tiny_tokenizer, "abcdefghijklmnop", {3: 2.0, 6: 1.0})
    audit = asyncio.run(auditor(tiny_tokenizer, teacher, chunk_overlap="merge").audit(*path))
    [chunk] = audit.chunks
    assert (chunk.chunk.start, chunk.chunk.end) == (3, 10)
    assert teacher.calls[0][1].max_tokens == math.ceil(1.4 * 7)
    assert chunk.rollouts[0] == "defghij"


def test_results_keep_the_order_of_trajectories(tiny_tokenizer):
    """Concurrent audits that finish in any order come back in theirs."""

    class Slow(Teacher):
        name = "slow"

        async def sample(self, prefixes, request):
            await asyncio.sleep(0.05 / len(prefixes[0].prompt))
            return [TeacherReply((Rollout(prefixes[0].prompt),), Usage(completion_tokens=1)) for _ in prefixes]

    base, scores = trajectory(tiny_tokenizer, "abcdefgh", {1: 1.0})
    paths = [replace(base, prompt="p" * n) for n in (1, 4, 2)]
    judge = auditor(tiny_tokenizer, Slow())
    loop = EventLoopThread()
    try:
        audits = [future.result(timeout=10) for future in loop.submit(*(judge.audit(path, scores) for path in paths))]
    finally:
        loop.close()
    assert [audit.chunks[0].rollouts[0] for audit in audits] == ["p", "pppp", "pp"]


def test_event_loop_thread_works_inside_a_running_loop():
    """A notebook runs the trainer inside a loop of its own."""

    async def thread_name() -> str:
        return threading.current_thread().name

    async def notebook() -> str:
        return loop.run(thread_name())

    loop = EventLoopThread()
    try:
        assert asyncio.run(notebook()) == "omniopd-teacher"
        with pytest.raises(ZeroDivisionError):
            loop.run(_fail())
    finally:
        loop.close()
    assert not loop._thread.is_alive()


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, GeneratorExit])
def test_what_ends_a_process_does_not_end_the_loop(kind):
    """A teacher that calls `sys.exit` is an error like others: what else is in flight comes back, and so does it."""

    async def leave() -> None:
        raise kind("bad key")

    async def answer() -> int:
        await asyncio.sleep(0.01)
        return 3

    loop = EventLoopThread()
    try:
        left, answered = loop.submit(leave(), answer())
        with pytest.raises(RuntimeError, match=rf"a teacher raised {kind.__name__}\(bad key\)"):
            left.result(timeout=10)
        assert answered.result(timeout=10) == 3
        assert loop.run(answer()) == 3
    finally:
        loop.close()


def test_a_teacher_that_cancels_itself_is_not_waited_for_without_end():
    """As one does that waits for a task which was cancelled."""

    async def cancelled() -> Audit:
        await asyncio.sleep(0.2)  # until it is waited for
        raise asyncio.CancelledError

    loop = EventLoopThread()
    waiting = threading.Thread(target=lambda: wait(loop.submit(cancelled()), return_when=FIRST_COMPLETED), daemon=True)
    try:
        waiting.start()
        waiting.join(timeout=10)
        assert not waiting.is_alive()
    finally:
        loop.close()


def test_a_cancellation_that_a_library_swallows_is_repeated(monkeypatch):
    """Otherwise a user who stops the run waits for a loop that polls a service."""
    monkeypatch.setattr(event_loop, "CANCEL_AGAIN_SECONDS", 0.01)
    swallowed = []

    async def poll() -> None:
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                if len(swallowed) == 2:
                    raise
                swallowed.append(1)

    loop = EventLoopThread()
    try:
        (polling,) = loop.submit(poll())
        loop.run(asyncio.sleep(0.01))
        stopping = threading.Thread(target=loop.cancel, daemon=True)
        stopping.start()
        stopping.join(timeout=10)
        assert not stopping.is_alive()
        assert polling.done()
        assert len(swallowed) == 2
    finally:
        loop.close()


def test_what_has_not_begun_when_all_is_cancelled_never_begins():
    """A teacher that computes in the loop blocks it: a user who stops the run waits for one call, not for all."""
    begun = []
    started = threading.Event()

    async def compute(n: int) -> None:
        begun.append(n)
        started.set()
        time.sleep(0.3)

    loop = EventLoopThread()
    try:
        futures = loop.submit(*map(compute, range(20)))
        started.wait(timeout=10)
        loop.cancel()
        assert len(begun) <= 2
        assert all(future.done() for future in futures)
        loop.run(compute(99))
        assert begun[-1] == 99
    finally:
        loop.close()


async def _fail() -> None:
    raise ZeroDivisionError


@pytest.mark.parametrize(
    ("replies", "words"),
    [
        (lambda n: [TeacherReply((Rollout("a"),))], "must return a list of 2 replies, one per prefix, but returned"),
        (lambda n: None, "must return a list of 2 replies, one per prefix, but returned None (NoneType)"),
        (lambda n: ["a", "b"], "reply 0 of 2 must be a `TeacherReply`, but is 'a' (str)"),
        (lambda n: [TeacherReply(), TeacherReply(("a",))], "reply 1 of 2 must hold `Rollout(text)`"),
        (lambda n: [TeacherReply(), TeacherReply("abc")], "must hold a tuple of rollouts, but holds 'abc' (str)"),
        (lambda n: [TeacherReply((Rollout(None),))] * 2, "with a text that is a `str`, but holds Rollout(text=None"),
        (lambda n: [TeacherReply((Rollout(b"a"),))] * 2, "with a text that is a `str`, but holds Rollout(text=b'a'"),
        (lambda n: [TeacherReply((Rollout("a"),) * (n + 1))] * 2, "holds 4 rollouts, but at most num_samples=3"),
        (lambda n: [TeacherReply(usage=12)] * 2, "the usage of reply 0 of 2 must be a `Usage`, but is 12 (int)"),
        (lambda n: [TeacherReply(outcomes=["x"])] * 2, "the outcomes of reply 0 of 2 must be a dictionary"),
    ],
)
def test_replies_that_are_none(tiny_tokenizer, replies, words):
    """A mistake in a custom teacher is named with the teacher, the reply and the rule."""

    class Own(Teacher):
        name = "my-api"

        async def sample(self, prefixes, request):
            return replies(request.num_samples)

    path = trajectory(tiny_tokenizer, "abcdefghijklmnop", {3: 2.0, 9: 1.0})
    with pytest.raises(TeacherError) as caught:
        asyncio.run(auditor(tiny_tokenizer, Own()).audit(*path))
    assert str(caught.value).startswith("The teacher 'my-api' (Own) does not follow `Teacher.sample`: ")
    assert words in str(caught.value)
    assert "docs/teachers.md" in str(caught.value)


def test_a_teacher_that_is_not_async(tiny_tokenizer):
    """A plain function is the likeliest mistake of all."""

    class Own(Teacher):
        def sample(self, prefixes, request):
            return [TeacherReply() for _ in prefixes]

    path = trajectory(tiny_tokenizer, "abcdefghijklmnop", {3: 2.0, 9: 1.0})
    with pytest.raises(TeacherError, match=r"'Own' \(Own\).*Write it as `async def sample`"):
        asyncio.run(auditor(tiny_tokenizer, Own()).audit(*path))


@pytest.mark.case("R10")
@pytest.mark.parametrize(
    ("make", "prompt", "completion"),
    [
        (llama_2, "The capital of France is", " Paris."),
        (llama_2, "Tom has", "12"),
        (lambda: llama_style_tokenizer(None), "Tom has", " 7 apples"),
        (metaspace, "Tom has", " 7 apples"),
        (word_piece, "the angle", "s are"),
        (word_piece, "the", " angles, 12"),
        (None, "Tom has", " 7 apples"),
        (None, "Tom has 漢字", "字 and"),
    ],
)
def test_the_students_own_text_after_a_prompt(make, prompt, completion, tiny_tokenizer):
    """The teacher gets the space, or its absence, between prompt and completion as the student wrote it."""
    tokenizer = tiny_tokenizer if make is None else make()
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    ids = tokenizer(prompt + completion, add_special_tokens=False)["input_ids"]
    assert ids[: len(prompt_ids)] == prompt_ids, "the completion would begin within a token"
    written, alignment = ids[len(prompt_ids) :], Alignment(tokenizer)
    for cut in range(len(written)):
        ((prefix, text),) = alignment.split_texts(written, [Chunk(cut, len(written), cut)], prompt_ids)
        assert prefix + text == completion
        assert (prompt + completion).startswith(prompt + prefix)


@pytest.mark.case("R10")
def test_the_teacher_is_asked_for_the_students_own_text():
    """The auditor passes the prompt's tokens on."""
    tokenizer, teacher = llama_2(), Recorder(["x"])
    prompt_ids = tokenizer("Tom has", add_special_tokens=False)["input_ids"]
    ids = tokenizer("Tom has 7 apples and 7 more", add_special_tokens=False)["input_ids"][len(prompt_ids) :]
    entropy = torch.full((len(ids),), 0.1)
    entropy[1] = 1.0
    scores = PolicyScores(torch.zeros(len(ids)), entropy, torch.zeros(len(ids)))
    judge = auditor(tokenizer, teacher, num_chunks=1)
    asyncio.run(judge.audit(Trajectory("Tom has", prompt_ids, ids), scores))
    [([prefix], _)] = teacher.calls
    assert prefix.prompt + prefix.completion == tokenizer.decode([*prompt_ids, *ids[:1]]) == "Tom has 7"


@pytest.mark.case("R9")
def test_special_tokens_inside_an_answer(tiny_tokenizer):
    """The teacher gets the marks between thoughts and answer if they are kept; chunks are compared without them."""
    tokenizer = channels(tiny_tokenizer)
    text = "<|channel|>analysis<|message|>漢 3 + 4<|end|><|start|>assistant<|channel|>final<|message|>7"
    prompt_ids = tokenizer("<|start|>user<|message|>3 + 4?<|end|><|start|>assistant")["input_ids"]
    ids = tokenizer(text)["input_ids"]
    chunks = [Chunk(start, start + 6, start) for start in range(0, len(ids) - 6, 3)]
    plain = Alignment(tokenizer).split_texts(ids, chunks, prompt_ids)
    kept = Alignment(tokenizer, keep_special_tokens=True).split_texts(ids, chunks, prompt_ids)
    assert [chunk for _, chunk in kept] == [chunk for _, chunk in plain]
    for chunk, (prefix, _), (without, _) in zip(chunks, kept, plain, strict=True):
        assert prefix == tokenizer.decode(ids[: chunk.start]).rstrip("\ufffd")
        assert text.startswith(prefix)
        assert "<|" not in without
    assert kept[-1][0].count("<|") > 3


# ---- The models that answered ----

LONG_TEXT = "First we add the apples of Tom to the pears of Ann, and then we divide by two. " * 4


def audits_of(tokenizer, teacher, count, **overrides):
    """Audits of equal trajectories with two chunks of 60 tokens each, by one auditor."""
    judge = auditor(tokenizer, teacher, chunk_length=60, num_rollouts=4, **overrides)
    one = trajectory(tokenizer, LONG_TEXT, {0: 2.0, 80: 2.0})
    return [asyncio.run(judge.audit(*one)) for _ in range(count)]


@pytest.mark.case("P4")
def test_the_models_of_an_audit(tiny_tokenizer):
    """An audit names each model that answered once."""

    class Routed(Recorder):
        async def sample(self, prefixes, request):
            replies = await super().sample(prefixes, request)
            return [replace(reply, models=(f"model-{i % 2}", "model-0")) for i, reply in enumerate(replies)]

    (audit,) = audits_of(tiny_tokenizer, Routed(lambda prefix, index: "7"), 1)
    assert audit.models == ("model-0", "model-1")


# ---- Imitated rollouts ----


@pytest.mark.parametrize("make", [llama_2, metaspace, None], ids=["llama-2", "metaspace", "byte-level"])
@pytest.mark.parametrize("trim", [str, str.lstrip], ids=["written", "trimmed"])
def test_imitated_tokens_of_the_students_own_text(make, trim, tiny_tokenizer):
    """At every position they are the student's own next tokens, also when all spaces before rollouts are trimmed."""
    tokenizer = tiny_tokenizer if make is None else make()
    alignment = Alignment(tokenizer)
    odd = "" if make is metaspace else "漢字 and 😀."  # its decoder joins no bytes
    ids = tokenizer(f"{LINES} {odd} {LINES}", add_special_tokens=False)["input_ids"]
    prompt_ids, ids = ids[:5], ids[5:]
    chunks = [Chunk(start, start + 8, start) for start in range(len(ids) - 12)]
    texts = [text for _, text in alignment.split_texts(ids, chunks, prompt_ids)]
    longer = [text for _, text in alignment.split_texts(ids, [replace(c, end=c.end + 4) for c in chunks], prompt_ids)]
    rollouts = [[trim(text), f"{trim(text)}zzz"] for text in longer]
    found = alignment.continuations(ids, chunks, texts, rollouts, prompt_ids, max_tokens=3)
    inside = [c for c in chunks if tokenizer.decode([*prompt_ids, *ids[: c.start]]).endswith("\ufffd")]
    for chunk, of_chunk in zip(chunks, found, strict=True):
        own = tuple(ids[chunk.start : chunk.start + 3])
        assert of_chunk == ([None] * 2 if chunk in inside else [own] * 2), chunk
    assert bool(inside) == bool(odd), "no chunk begins inside a character"


@pytest.mark.parametrize(
    ("before", "chunk", "rollout", "imitated"),
    [
        ("Tom has 3", " apples", "buys 4", " buys"),
        ("Tom has 3", " apples", "4 apples", "4"),
        ("Tom has 3", " apples", ". So", "."),
        ("Tom has 3", " apples", "", None),
        ("Tom has", " 3", "4 apples", " 4"),
    ],
    ids=["word", "digit", "punctuation", "nothing", "number"],
)
def test_the_space_before_a_single_rollout(before, chunk, rollout, imitated, tiny_tokenizer):
    """No other rollout tells whether the service trims it. Where text follows without a space, none is added."""
    ids = tiny_tokenizer(f"{before}{chunk}", add_special_tokens=False)["input_ids"]
    start = len(tiny_tokenizer(before, add_special_tokens=False)["input_ids"])
    found = Alignment(tiny_tokenizer).continuations(
        ids, [Chunk(start, start + 4, start)], [chunk], [[rollout]], [], max_tokens=4
    )
    expected = tiny_tokenizer(imitated or "", add_special_tokens=False)["input_ids"]
    assert found[0][0][: len(expected)] == tuple(expected)
    assert bool(found[0][0]) == bool(imitated)


def test_what_is_left_out_of_an_imitation(tiny_tokenizer):
    """Letters that join the student's last token, and special tokens that a rollout spells; nothing is no token."""
    alignment = Alignment(tiny_tokenizer)
    whole = tiny_tokenizer(" apples now", add_special_tokens=False)["input_ids"]
    ids = [*tiny_tokenizer("Tom has 3 app", add_special_tokens=False)["input_ids"], *whole]
    start = len(ids) - len(whole)
    joined = tiny_tokenizer("Tom has 3 apples now", add_special_tokens=False)["input_ids"]
    assert joined[:start] != ids[:start], "the tokenizer joins nothing here"
    rollouts = ["les", " apples now", "", "7<|im_end|>", " 7 apples<|im_end|>"]
    chunk = Chunk(start, len(ids), start)
    (found,) = alignment.continuations(ids, [chunk], [" apples now"], [rollouts], [], max_tokens=2)
    seven = tiny_tokenizer(" 7 apples", add_special_tokens=False)["input_ids"]
    assert found == [None, tuple(whole[:2]), (), None, tuple(seven)]
    assert alignment.texts_of(found) == [None, tiny_tokenizer.decode(whole[:2]), "", None, " 7 apples"]
    assert alignment.continuations(ids, [chunk], [" apples now"], [[]], [], max_tokens=2) == [[]]
