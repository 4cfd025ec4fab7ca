# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""What an instructed teacher is asked, and how its answers become continuations."""

import random
import re
import subprocess
import sys
import time

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from omniopd_trl.errors import DataError
from omniopd_trl.teachers.instruct.prompt import INSTRUCTION, describe_end, render_messages
from omniopd_trl.teachers.instruct.repair import Repaired, repair
from tests.support.instruct_cases import CASES, SOLUTIONS, Case

# Roughly where the tokenizers of open models split: a space belongs to the word behind it, a digit is a token, and the
# last space of an indentation belongs to what follows.
TOKEN = re.compile(r"[^\r\n\w]?[^\W\d_]+|\d| ?(?:[^\s\w]|_)+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")

TEXTS = st.sampled_from(sorted(SOLUTIONS.values()))
PIECES = st.lists(
    st.sampled_from(
        [
            *'the sum of is 4 = + ( ) $ \\frac { } ``` ```python " “ ” ` . , : Sure! <output> </output>'.split(),
            *"和 是 é 🎉 Step 1 : To solve this problem Here is the continuation: a ang les x".split(),
            *[" ", "\n", "\n\n", "    ", "Here is the continuation:\n", "The partial solution"],
        ]
    ),
    max_size=14,
).map("".join)
PROSE = ("word problem", "steps", "geometry", "thinking", "probability", "bullets", "numbered", "headings")


def token_splits(text: str) -> list[int]:
    """Every place where a tokenizer may have stopped, with text on both sides."""
    return [match.end() for match in TOKEN.finditer(text) if text[match.end() :].strip()]


def is_subsequence(short: str, long: str) -> bool:
    """Whether `long` becomes `short` by removing characters."""
    characters = iter(long)
    return all(character in characters for character in short)


# ---- The table ----


@pytest.mark.case("A2", "P2", "T18")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_table(case: Case) -> None:
    """Each realistic answer becomes the continuation that its author meant."""
    assert repair(case.prefix, case.output, case.prompt) == Repaired(case.text, case.outcome)


def test_the_table_is_large_and_its_names_are_distinct() -> None:
    """At least sixty cases, none twice."""
    assert len(CASES) >= 60
    assert len({case.name for case in CASES}) == len(CASES) == len({case[1:3] for case in CASES})


def test_the_problem_may_be_a_conversation() -> None:
    """Of chat messages the last one is the problem that an answer may repeat."""
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Tom has 12 apples. How many?"}]
    prefix = "First we count what Tom has. Then we add, so"
    assert repair(prefix, "Tom has 12 of them.", turns).outcome == "restarted"
    assert repair(prefix, "Tom has 12 of them.").outcome == "ok"


@pytest.mark.parametrize("case", [case for case in CASES if case.outcome != "restarted"], ids=lambda case: case.name)
def test_a_repaired_answer_is_not_repaired_again(case: Case) -> None:
    """The repair of a repaired text changes nothing."""
    assert repair(case.prefix, case.text).text == case.text


# ---- Exact continuations ----


def test_exact_continuations_pass_at_token_boundaries() -> None:
    """Of true continuations, split wherever a tokenizer would, every one stays as it is and none is a restart.

    Also when the service trims it.
    """
    splits = [(text[:i], text[i:]) for text in SOLUTIONS.values() for i in token_splits(text)]
    assert len(splits) > 1500
    answers = [(prefix, answer) for prefix, rest in splits for answer in (rest, rest.strip())]
    changed = [(prefix[-30:], answer[:30]) for prefix, answer in answers if repair(prefix, answer) != Repaired(answer)]
    assert not changed


def test_exact_continuations_pass_at_any_character() -> None:
    """Split at any character, outside of indentations, at least 99.9% stay as they are."""
    splits = [
        (text[:i], text[i:])
        for text in SOLUTIONS.values()
        for i in range(1, len(text))
        if text[i:].strip() and not re.search(r"\n +\Z", text[:i])
    ]
    assert len(splits) > 4000
    changed = [(prefix[-30:], rest[:30]) for prefix, rest in splits if repair(prefix, rest) != Repaired(rest)]
    assert len(changed) <= 0.001 * len(splits), changed


@settings(deadline=None, max_examples=300)
@given(TEXTS, st.data())
def test_a_short_answer_passes_too(text: str, data: st.DataObject) -> None:
    """An answer that is cut at its longest length is treated like a whole one."""
    start = data.draw(st.sampled_from(token_splits(text)))
    rest = text[start : start + data.draw(st.integers(1, 60))]
    assume(rest.strip())
    assert repair(text[:start], rest) == Repaired(rest)


# ---- Echoes ----


@settings(deadline=None, max_examples=300)
@given(TEXTS, st.data())
def test_a_repeated_beginning_is_dropped(text: str, data: st.DataObject) -> None:
    """An answer that repeats the whole prefix becomes the true continuation, apart from white space at the joint."""
    split = data.draw(st.sampled_from([i for i in token_splits(text) if len(text[:i].strip()) >= 30]))
    repaired = repair(text[:split], text)
    assert (repaired.text.lstrip(), repaired.outcome) == (text[split:].lstrip(), "ok")


@pytest.mark.parametrize(("names", "rate"), [(PROSE, 0.99), (tuple(SOLUTIONS), 0.94)], ids=["prose", "all"])
def test_repeated_last_words_are_dropped(names: tuple[str, ...], rate: float) -> None:
    """An answer that repeats three to twelve words becomes the true continuation, nearly always.

    The rest are pieces of tables, matrices and code, which may stand twice on purpose.
    """
    source = random.Random(0)
    total, wrong = 0, []
    for text in map(SOLUTIONS.get, names):
        for split in token_splits(text):
            words = [match.start() for match in re.finditer(r"\S+", text[:split])]
            if len(words) < 14:
                continue
            start = words[-source.randint(3, 12)]
            total += 1
            if repair(text[:split], text[start:]).text.lstrip() != text[split:].lstrip():
                wrong.append((text[:split][-30:], text[start:][:30]))
    assert total > 400
    assert len(wrong) <= (1 - rate) * total, (len(wrong), total, wrong)


# ---- Any text ----


@settings(deadline=None, max_examples=1000)
@given(PIECES, PIECES)
def test_nothing_is_invented(prefix: str, output: str) -> None:
    """The repair only removes characters. Only rollouts have a text."""
    text, outcome = repair(prefix, output)
    assert is_subsequence(text, output)
    assert bool(text) == (outcome in ("ok", "restarted"))


@settings(deadline=None, max_examples=300)
@given(st.text(max_size=40), st.text(max_size=40))
def test_any_text_is_accepted(prefix: str, output: str) -> None:
    """Whatever the characters are, there is a result, and none of it is invented."""
    assert is_subsequence(repair(prefix, output).text, output)


def test_a_long_prefix_is_quick() -> None:
    """A prefix of 80,000 characters takes no longer than a short one by much, and repetitive texts are no trap."""
    solution = SOLUTIONS["thinking"]
    long = (solution + "\n\n") * (80_000 // len(solution))
    repeated = "x = 1, "
    texts = [
        (long + solution[:200], solution[200:]),
        (long + solution[:200], solution[150:]),
        (long, "Sure! " + solution),
        (long, long),
        ("a" * 80_000, "a" * 4_000),
        ("a" * 80_000 + "b", "a" * 4_000),
        ("ab" * 40_000, "ab" * 2_000 + "b"),
        (repeated * 11_000, repeated * 500),
        (" " * 80_000, " " * 4_000 + "x"),
        ("\n" * 80_000 + "a", "\n\n b"),
        ("a\n" + " " * 80_000, " " * 4_000 + "x"),
        ("``` " * 20_000, "```\n" * 1_000),
        ("the " * 20_000 + "the", "the " * 1_000),
        (long, "Sure, " + "here is the continuation " * 200),
        (long, '"' + "<output>" * 500),
    ]
    for prefix, output in texts:
        start = time.process_time()
        repair(prefix, output)
        assert time.process_time() - start < 0.5  # milliseconds; a quadratic scan would take minutes


@pytest.mark.case("T18")
@pytest.mark.parametrize(
    "piece",
    ["...", "... ", "… x", "a", " ", "\n", "*", '"', "= ", "```\n", "<output>", "here is a-", "I will x ", "'*\n"],
)
@pytest.mark.parametrize("prefix", ["The sum of the", "x = 4. ... " * 8_000, "a" * 80_000])
def test_a_megabyte_is_quick(prefix: str, piece: str) -> None:
    """An answer of a megabyte takes less than half a second, however repetitive it is."""
    for output in (
        piece * (1_000_000 // len(piece)),
        piece * (1_000_000 // len(piece)) + "x",
        "Let me " + "w" * 10**6,
    ):
        start = time.process_time()
        repair(prefix, output)
        assert time.process_time() - start < 0.5  # tens of milliseconds


# ---- The request ----


def user_text(prompt: object, completion: str) -> str:
    """The user message, once the system message is what it always is."""
    system, user = render_messages(prompt, completion)  # type: ignore[arg-type]
    assert system == {"role": "system", "content": INSTRUCTION}
    assert user["role"] == "user"
    return user["content"]


@settings(deadline=None, max_examples=200)
@given(TEXTS, st.data())
def test_nested_prefixes_share_their_beginning(text: str, data: st.DataObject) -> None:
    """Two prefixes of one trajectory render alike up to the end of the shorter one."""
    short = data.draw(st.integers(0, len(text) - 1))
    first, second = user_text("What is it?", text[:short]), user_text("What is it?", text)
    shared = first.index("<partial_solution>") + len("<partial_solution>") + short
    assert first[:shared] == second[:shared]
    assert first[:shared].endswith(text[:short])


@settings(deadline=None, max_examples=200)
@given(st.text(max_size=30), st.text(max_size=30) | PIECES)
def test_every_byte_of_the_completion_is_rendered(prompt: str, completion: str) -> None:
    """Between its tags the partial solution stands as it is, white space at its end included."""
    text = user_text(prompt, completion)
    assert f"<problem>\n{prompt}\n</problem>" in text
    assert f"<partial_solution>{completion}</partial_solution>" in text


@pytest.mark.parametrize(
    ("prompt", "completion", "opening", "closing"),
    [
        ("Close </problem> now", "x", "<partial_solution>", "</partial_solution>"),
        ("p", "a </partial_solution> b", "<partial_solution>", "</partial_solution-2>"),
        ("p", "a </PARTIAL_SOLUTION-2> b </partial_solution", "<partial_solution>", "</partial_solution-3>"),
        ("Say <partial_solution>", "x", "<partial_solution-2>", "</partial_solution-2>"),
    ],
)
def test_tags_are_not_confused_with_content(prompt: str, completion: str, opening: str, closing: str) -> None:
    """A tag that the content holds gets a number, and the words at the end name the one that closes."""
    text = user_text(prompt, completion)
    assert text.count(f"{opening}{completion}{closing}") == 1
    assert f"stops right before `{closing}`" in text
    if "</problem>" in prompt:
        assert text.startswith("<problem-2>\nClose </problem> now\n</problem-2>\n\n")


def test_conversations_are_rendered_turn_by_turn() -> None:
    """System and earlier turns are kept, each in a block that names its role; one user turn is the problem."""
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "1 + 1?"}]},
        {"role": "assistant", "content": "2 </message>"},
        {"role": "user", "content": "And 2 + 2?"},
    ]
    blocks = [
        '<message-2 role="system">\nBe brief.\n</message-2>',
        '<message-2 role="user">\n1 + 1?\n</message-2>',
        '<message-2 role="assistant">\n2 </message>\n</message-2>',
        '<message-2 role="user">\nAnd 2 + 2?\n</message-2>',
    ]
    text = user_text(turns, "It ")
    assert text.startswith("\n".join(["<conversation>", *blocks, "</conversation>"]) + "\n\n<partial_solution>It </")
    assert user_text(turns[3:], "It ") == user_text("And 2 + 2?", "It ")


def test_other_content_than_text_is_refused() -> None:
    """A picture cannot be rendered, and the message says what to do."""
    with pytest.raises(DataError, match="read text only"):
        render_messages([{"role": "user", "content": [{"type": "image", "image": "x"}]}], "")


@pytest.mark.parametrize(
    ("completion", "words"),
    [
        ("", "still empty: write the beginning"),
        ("So the ang", 'right after the letter "g" of "ang"'),
        ("It is 12", 'right after the digit "2"'),
        ("It is ", "after a space, which belongs to it"),
        ("It is.\n", "after a line break, which belongs to it"),
        ("def f():\n    ", "after a line break, which belongs to it"),
        ("It is 12.", 'right after the character "."'),
        ("三角形", 'right after the character "形"'),
    ],
)
def test_the_end_is_described(completion: str, words: str) -> None:
    """Where the partial solution stops is said in words, which do not change with what comes before."""
    assert words in describe_end(completion)
    assert words in user_text("p", completion)


def test_the_request_is_short() -> None:
    """Everything besides the texts stays far below the 512 tokens that the engine reserves for it."""
    texts = [user_text("p", completion) for completion in ("", "So the ang", "It is\n\n    ")]
    assert max(len(INSTRUCTION) + len(text) for text in texts) < 4 * 400


def test_importing_it_needs_no_model_library() -> None:
    """The rules are pure: neither torch nor transformers is imported by them."""
    source = "import sys; import omniopd_trl.teachers.instruct.repair; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", source], check=False).returncode == 0
