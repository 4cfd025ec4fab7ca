# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Math accuracy: what is read from a completion, what counts as equal, and what happens when nothing can be read."""

import logging
import math
import re
import sys
import threading
import time
from datetime import date

import pytest
from datasets import Dataset

from omniopd_trl.errors import DataError, MissingExtraError
from omniopd_trl.evals import math_accuracy, workers
from omniopd_trl.evals.math import as_votes, read_answers
from omniopd_trl.evals.numbers import plain_number
from omniopd_trl.evals.rewards import Rewards
from omniopd_trl.evals.workers import Reading
from tests.support import ROOT


def score(completion, gold, **options):
    (reward,) = math_accuracy([completion], answer=[gold], **options)
    return reward


@pytest.mark.parametrize(
    ("completion", "gold"),
    [
        ("Answer: 7", "7"),
        ("3 + 4 = 7, so the answer is 7.\nAnswer: 7", "7"),
        ("Answer: 5\nWait, that was wrong.\nAnswer: 7", "7"),
        ("**Answer:** 7", "7"),
        ("answer : 7.", "7"),
        ("Answer: $7$", "7"),
        ("Answer: $18", "18"),
        (r"Answer: \$18.00", "18"),
        ("Answer: 1,234", "1234"),
        ("Answer: 12 apples", "12"),
        ("Answer: -3", "-3"),
        ("Answer: 0.5", r"\frac{1}{2}"),
        ("Answer: 1/2", "0.5"),
        (r"Answer: \frac{1}{2}", "1/2"),
        (r"Answer: \dfrac{3}{4}", r"\frac34"),
        ("Answer: 1, -2", "-2,1"),
        (r"Answer: \boxed{3, 5, 7}", "3,5,7"),
        ("Answer: 2, 5", "$2$, $5$"),
        ("Answer: \u0663\u066b\u0665", "3.5"),
        ("Answer: \u0661\u066c\u0662\u0663\u0664", "1234"),
        ("Answer: (\u0663, \u0664)", "(3, 4)"),
        ("Answer: 3.5", "\u0663\u066b\u0665"),
        ("Answer: \uff17", "\uff17"),
        *(
            (f"Answer: {form}", "1, 2")
            for form in ("1 or 2", "1 and 2", "x = 2 or x = 1", "x = 1, x = 2", "$x=1$, $x=2$")
        ),
        *((f"Answer: {form}", "1, 2") for form in (r"\boxed{1 \text{ or } 2}", "x_1 = 1; x_2 = 2")),
        *(("Answer: 3, -2", gold) for gold in ("3 or -2", "x = 3, x = -2", r"$x=-2 \text{ or } x=3$")),
        ("Answer: a and b", "b, a"),
        (r"Answer: \boxed{7}", "7"),
        (r"so we get \boxed{\frac{1}{3}}.", r"\frac{1}{3}"),
        (r"Answer: \sqrt{2}", r"$\sqrt{2}$"),
        (r"Answer: $2\sqrt{3}$", r"\sqrt{12}"),
        (r"Answer: 2^{10}", "2^{10}"),
        (r"Answer: 3 \times 10^4", "30000"),
        ("Answer: (1, 2)", "(1,2)"),
        ("Answer: 3x + 2", "2 + 3x"),
        ("Answer: $x = 5$", "5"),
        ("Answer:\n$$\n\\frac{1}{2}\n$$", r"\frac{1}{2}"),
        ("Answer: 7\nThat took 3 steps.", "7"),
        ("Tom has 7 apples.", "7"),
        ("<think>Perhaps Answer: 5?</think>So it is \\boxed{7}.", "7"),
        ("<think>Answer: 5</think>\n\nAnswer: 7", "7"),
        ([{"role": "assistant", "content": "Answer: 7"}], "7"),
        ("Answer: 7", 7),
        ("Answer: 2.5", 2.5),
        ("Answer: 7", ["7"]),
        ("Answer: 2, 7", ["7", "2"]),
        # A worked solution as the right answer: GSM8K's form, the MATH dataset's, and this package's.
        ("Answer: 72", "She sold 48 / 2 = 24 clips in May.\n48 + 24 = 72.\n#### 72"),
        ("Answer: 7", r"First we add 3 and 4, which makes \boxed{7}."),
        ("Answer: 7", "3 + 4 = 7. Answer: 7"),
    ],
)
def test_right(completion, gold):
    """Equal by value, in whatever form both are written."""
    assert score(completion, gold) == 1.0


@pytest.mark.parametrize(
    ("completion", "gold"),
    [
        ("Answer: 8", "7"),
        ("Answer: 7\nNo.\nAnswer: 8", "7"),
        # An answer counts, not a number on the way to it.
        ("<think>So Answer: 7</think>\n\nIt is 8.", "7"),
        ("<think>So Answer: 7</think>", "7"),
        ("3 + 4 = 7. Answer: 8", "7"),
        ("Answer: 2^{10}", "2"),
        ("Answer: 3x + 2", "3"),
        (r"Answer: 3 \times 10^4", "10000"),
        (r"Answer: \frac{1}{2}", "2"),
        ("Answer: (1, 3)", "(1, 2)"),
        ("Answer: 2", "1, 2"),
        ("Answer: 2", "1 or 2"),
        ("Answer: 2", ["1", "2"]),
        ("Answer: 2", "x = 1, x = 2"),
        ("Answer: 1 or 3", "1 or 2"),
        ("Answer: 1.2", "1,2"),
        ("Answer: 1, 3", "1, 2"),
        ("", "7"),
        ("   \n", "7"),
        ("I do not know.", "7"),
        ("Answer:", "7"),
        (r"Answer: \$Answer", "7"),
        ("Answer: \\frac{1}{", "7"),
        ("Answer: " + "{" * 500, "7"),
        ("Answer: \x00\ufffd", "7"),
        ([], "7"),
        ([{"role": "assistant", "content": None}], "7"),
    ],
)
def test_wrong(completion, gold):
    """Wrong, empty and unreadable completions are 0.0, without an exception."""
    assert score(completion, gold) == 0.0


@pytest.mark.case("R21")
@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        *((form, "1234") for form in ("1234", "1,234", "1 234", "1_234", "1234.00", "$1,234", r"\$1,234.00", "+1234")),
        *((form, "1234") for form in (r"1{,}234", r"1\,234", r"$1234$", r"\(1234\)", r"\[1234\]", r"\boxed{1234}")),
        *(
            (form, "1234")
            for form in (r"\text{1234}", r"\boxed{\text{1234 m}}", r"\mathbf{1{,}234}", "**1234**", "`1234`")
        ),
        *(
            (form, "1234")
            for form in (
                "1234 apples",
                "1234 m",
                "1234 km/h",
                "1234 m²",
                r"1234\text{ cm}^2",
                r"\text{1234 cm}",
                "1234-page",
            )
        ),
        *(
            (form, "1234")
            for form in ("1234%", r"1234\%", "1234°", r"1234^{\circ}", "1234 °C", "1234 (apples)", "1234?")
        ),
        *((form, "1234") for form in ("x = 1234", "N = 1{,}234", r"\approx 1234", "1000 + 234 = 1234", "about 1234.")),
        *((form, "1234") for form in ("1.234e3", r"1.234 \times 10^{3}", "1.234*10^3", r"1000 + 234 = \boxed{1234}")),
        *((form, "0.5") for form in ("1/2", r"\frac12", r"\dfrac{1}{2}", ".5", "0.50", "50%", "50 percent", "5e-1")),
        *((form, "1/2") for form in ("2/4", r"\frac{50}{100}", "0.5")),
        *(
            (form, "-0.5")
            for form in (r"\frac{-1}{2}", r"\frac{1}{-2}", r"-\frac{1}{2}", r"-\frac12", r"$\frac{ - 1 }{ 2 }$")
        ),
        *((form, "37") for form in ("x = 37, x = 37", "12 + 30 = 42, 42 - 5 = 37")),
        *((form, "-3") for form in ("-3", "\u22123", "- 3", "-3.0")),
        *((form, "1.5") for form in ("3/2", "1 1/2", r"1\frac{1}{2}")),
        *((form, "16") for form in ("16 m^3", "16 cm^2", "a total of 16 a day")),
        *((form, "50%") for form in ("50", "0.5", "50 percent")),
        *((form, "-37") for form in ("\uff0d37", "\uff0d\uff13\uff17", "\u201037", "\uff0d37\uff0e0")),
        *((form, "0.5") for form in ("½", "\uff15\uff10\uff05")),
        *((form, "1.5") for form in ("1½", "1 ½")),
        *((form, "1234") for form in ("1'234", "1’234", "１，２３４")),
        *((form, "16") for form in ("16 m⁴", "16 m s⁻²", "16 m/s²", "16 degrees", "16 hundred-dollar bills")),
        *(
            (form, "42000000")
            for form in (
                "42 million",
                "$42$ million people",
                r"42\text{ Million}",
                r"\boxed{42} million",
                "42,000 thousand",
            )
        ),
        *((form, "42 million") for form in ("42000000", "4.2e7", "42.0 million")),
        *((form, "500000") for form in ("1/2 million", "5 hundred thousand", "x = 5 hundred thousand")),
        *(("3 dozen eggs", gold) for gold in ("3", "36", "3 dozen")),
        (r"\text{16 cm}", "16"),
        ("-¾", "-0.75"),
        (r"-\frac{-1}{2}", "0.5"),
        ("5", "$x = 5$"),
        ("37 pears", "37 apples"),
        ("37", "She has 12 + 30 - 5 of them.\n#### 37"),
    ],
)
def test_a_number_in_any_form_is_right(answer, gold):
    """Thousands separators, trailing zeros, units, LaTeX and scientific notation do not count."""
    assert score(f"Answer: {answer}", gold) == 1.0
    assert score(f"Answer: {answer}", gold, lenient=True) == 1.0


@pytest.mark.case("R21")
@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        *(
            (form, "37")
            for form in ("12 + 30 - 5", "$12 + 30 - 5$", r"\boxed{12 + 30 - 5}", "12+30-5 apples", "37 + 0")
        ),
        *(
            (form, "37")
            for form in ("74/2", r"\frac{74}{2}", "37/1", "37 * 1", r"37 \times 1", r"37 \cdot 1", "37 x 1")
        ),
        *((form, "37") for form in ("37 - 0", "37 = 12 + 30 - 5", "40 minus 3", "37^1", r"\sqrt{1369}", "sqrt(1369)")),
        *(
            (form, "37")
            for form in ("37 or 38", "38 or 37", "36, 37", "12, 30, 5, 37", "the sum of 12, 30 and 37", "37 7")
        ),
        *((form, "37") for form in ("x = 38 or x = 37", "38 or x = 37", "x = 38, x = 37", "x_1 = 38, x_2 = 37")),
        *((form, "37") for form in ("$x = 38$ or $x = 37$", "n = 36; n = 38; n = 37")),
        *(
            (form, "37")
            for form in ("37x", "x + 37", "37 - x", r"37\pi", "minus 37", "37!", "half of 37", "37 (12 + 30 - 5)")
        ),
        *((form, "1024") for form in (r"2^{10}", "2^10", "2**10", r"4 \cdot 2^8", "10.24 * 10^2")),
        *((form, "0.5") for form in ("2/4", "1 - 0.5", "1:2", "0,5")),
        *((form, "0.5") for form in (r"\frac{-1}{2}", r"-\frac{1}{2}")),
        *((form, "5") for form in ("5²", "5⁴", "5½", "±5", "≤ 5", "x ≠ 5", "x ≥ 5", "∛5", "\uff0d5")),
        *((form, "42") for form in ("42 million", r"42\text{ billion}", "42 thousand dollars", "$42$ hundred", "42k")),
        *(
            (form, "37")
            for form in ("not 37", "not $37$", r"not \boxed{37}", "isn’t equal to 37", "cannot be 37", "never 37")
        ),
        *((form, "37") for form in ("37 is wrong", r"\boxed{37} is not the right answer.", "$37$ isn’t correct")),
        ("42", "42 million"),
        ("3", "-3"),
        ("9e999999999", "37"),
        ("1/0", "37"),
    ],
)
def test_a_calculation_is_no_number(answer, gold):
    """Where the right answer is a plain number, repeating the question or naming several numbers is wrong."""
    assert score(f"Answer: {answer}", gold) == 0.0


@pytest.mark.case("R21")
def test_the_lenient_reading_is_an_option():
    """It compares values, as math-verify does."""
    assert score("Answer: 12 + 30 - 5", "37") == 0.0
    assert score("Answer: 12 + 30 - 5", "37", lenient=True) == 1.0
    assert score("Answer: 37 or 38", "38", lenient=True) == 1.0
    assert score(r"Answer: 2^{10}", "1024", lenient=True) == 1.0
    assert score("Answer: 42 million", "42", lenient=True) == 0.0
    # Without a mark, the number that math-verify finds counts, if it is one.
    assert score("First 12, then 30, then 5 less: 37.", "37") == 1.0
    assert score("It is 12 + 30 - 5.", "37") == 0.0
    assert score("There are 3 towns with 14 million people each, so 42 million.", "42000000") == 1.0
    assert score("There are 3 towns with 14 million people each, so 42 million.", "42") == 0.0
    assert score("We add. " * 99 + r"So it is \boxed{7}." + " Towns have 17 million people." * 20, "7") == 1.0
    assert score("First 12, then 30, then 5 less, which is not 37.", "37") == 0.0
    assert score("They are not enough: she has no more than 37.", "37") == 1.0
    assert score("First 12, then 30, then 5 less, so 37 is incorrect.", "37") == 0.0
    assert score("Answer: 37 is not prime, and is the answer.", "37") == 1.0


@pytest.mark.case("R21")
@pytest.mark.parametrize(
    "text",
    [
        *("1," * 500, "1 " * 500, "\\frac" * 200, "{" * 500, "1/" * 500, "\\text{" * 200, "a^" * 400),
        *("not the " * 200 + "x 1 x2", "1" + " million" * 150 + "x2", "1" + " " * 1000 + "x2", "\\boxed{}" * 100),
    ],
)
def test_reading_a_number_is_fast(text):
    """Every form is read in time proportional to its length."""
    start = time.monotonic()
    assert plain_number(text) is None
    assert time.monotonic() - start < 0.5


class TestColumns:
    """Which column holds the right answer."""

    def test_either(self):
        """One of the two is enough."""
        assert math_accuracy(["Answer: 7"], solution=["7"]) == [1.0]
        assert math_accuracy(["Answer: 7"], answer=["7"]) == [1.0]

    def test_answer_before_solution(self):
        """`answer` is the answer itself; a worked solution holds other numbers too."""
        assert math_accuracy(["Answer: 7"], solution=["It took 3 steps and gave 7 in 5 minutes"], answer=["7"]) == [
            1.0
        ]

    def test_solution_where_answer_fails(self):
        """A row whose `answer` is missing or unreadable falls back on its `solution`, and each row by itself."""
        rewards = math_accuracy(["Answer: 7"] * 3, solution=["7", "7", "7"], answer=[None, "seven", "8"])
        assert rewards == [1.0, 1.0, 0.0]

    def test_neither(self):
        """Without both the message names them and the way out."""
        with pytest.raises(DataError, match=r"`solution` or an `answer` column.*eval_reward_funcs"):
            math_accuracy(["Answer: 7"], prompts=["x"])

    def test_other_columns_are_ignored(self):
        """TRL passes every column and more by name."""
        assert math_accuracy(["Answer: 7"], answer=["7"], prompts=["x"], completion_ids=[[1]], source=["y"]) == [1.0]

    def test_empty_batch(self):
        """Nothing in, nothing out."""
        assert math_accuracy([], answer=[]) == []

    def test_lengths_must_agree(self):
        """A column of another length is a mistake of the caller, not a shorter result."""
        with pytest.raises(ValueError, match="shorter"):
            math_accuracy(["a", "b"], answer=["1"])


def test_unreadable_gold_is_none_and_said_once(caplog):
    """A right answer that is no mathematics counts neither way, and is named once however often it is asked for."""
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert math_accuracy(["Answer: 7", "Answer: 7"], answer=["no such number", "7"]) == [None, 1.0]
    warned = [record.getMessage() for record in caplog.records if "no such number" in record.getMessage()]
    assert len(warned) == 1
    assert "neither as right nor as wrong" in warned[0]


@pytest.mark.parametrize("gold", [{"a": [7]}, [7, [8]], ["7", None], b"7", True, math.nan, [], date(2024, 1, 7)])
def test_a_value_that_is_no_answer(gold):
    """A number somewhere in it is not the right answer. It counts neither way."""
    assert math_accuracy(["Answer: 7", f"Answer: {gold}"], answer=[gold] * 2) == [None, None]


@pytest.mark.parametrize(
    ("answers", "reads_nothing"),
    [(["two", "three"], True), (["two", "7"], False), ([None, "7"], False), ([None, None], False)],
)
def test_right_answers_that_nothing_can_read(answers, reads_nothing, caplog):
    """Said before anything is generated. Rows without a right answer, as in a mixture, are not looked at."""
    rows = Dataset.from_list([{"prompt": "1 + 1 =", "answer": answer} for answer in answers])
    assert Rewards(None, rows, device="cpu").reads_nothing is reads_nothing
    assert ("samples will have no score" in caplog.text) is reads_nothing
    assert Rewards(None, rows.to_iterable_dataset(), device="cpu").reads_nothing is (answers[0] == "two")
    assert not Rewards(lambda completions, **kwargs: [], rows, device="cpu").reads_nothing


def test_other_thread():
    """In another thread than the main one, with the same results."""
    results = []
    thread = threading.Thread(target=lambda: results.append(math_accuracy(["Answer: 7"], answer=["7"])))
    thread.start()
    thread.join()
    assert results == [[1.0]]


def test_endless_repetition_is_quick_and_quiet(caplog):
    """A student that repeats itself costs no time limit, and its text is not logged."""
    start = time.monotonic()
    with caplog.at_level(logging.WARNING):
        assert score("1 " * 20000, "7") == 0.0
        assert score("Answer: " + "1 " * 20000, "7") == 0.0
        assert score("7 " * 20000 + r"so it is \boxed{7}", "7") == 1.0
    assert time.monotonic() - start < 3
    assert not caplog.records


@pytest.mark.parametrize(
    ("completion", "gold", "expected"),
    [
        ("Answer: 7", "7", Reading(1.0, "7")),
        (r"so \boxed{14/2} or \boxed{7}", "7", Reading(1.0, "7")),
        ("Answer: 0.50", "1/2", Reading(1.0, "1/2")),
        (r"Answer: \frac{1}{3}", "1/2", Reading(0.0, "1/3")),
        *((f"Answer: {form}", "50", Reading(1.0, "50")) for form in ("50", "50%", "50.0")),
        ("Answer: 7\nNo: Answer: 8", "7", Reading(0.0, "8")),
        ("I do not know.", "7", Reading(0.0)),
        ("Answer: 7 or 8", "7", Reading(0.0)),
        # Digits of other scripts are digits.
        ("Answer: ٤٢", "42", Reading(1.0, "42")),
        ("Answer: ４２", "42", Reading(1.0, "42")),
        ("Answer: ४२", "42", Reading(1.0, "42")),
        ("答案：Answer：42", "42", Reading(1.0, "42")),
        ("答案：Answer：42 or 43", "42", Reading(0.0)),
        (r"Answer: $\sqrt{12}$", r"2\sqrt{3}", Reading(1.0, r"\sqrt{12}")),
        (r"Answer: x + 1", r"\sqrt{2}", Reading(0.0, "x + 1")),
        ("Answer: 7", "none", Reading(None)),
    ],
)
def test_what_is_read(completion, gold, expected):
    """The last answer, in a form in which equal numbers are equal texts; `None` where nothing can be read."""
    assert read_answers([completion], answer=[gold]) == [expected]


class TestVotes:
    """Which answers vote together in a majority."""

    def test_equal_answers(self):
        """Formulas of one value vote together where this decides, right answers and numbers always."""
        texts = (
            r"\sqrt{12}",
            "x+5",
            "7x",
            r"$2\sqrt{3}$",
            "5 + x",
            "7",
            "none",
            r"\frac{6}{\sqrt{3}}",
            "7.00000001",
            "7",
        )
        readings = read_answers([f"Answer: {text}" for text in texts], answer=["x + 5"] * len(texts))
        answers, scores = [one.answer for one in readings], [one.score for one in readings]
        assert (sum(scores), len({*answers})) == (2, 9)
        root, right = r"\sqrt{12}", "x+5"
        expected = [right if score else answer for answer, score in zip(answers, scores, strict=True)]
        expected[8] = "7"
        assert as_votes([answers], [scores]) == [expected], "7 has more votes than the right answer"
        expected = [root, right, "7x", root, right, "7", None, root]
        assert as_votes([answers[:8]], [scores[:8]]) == [expected]

    def test_no_needless_comparison(self, monkeypatch):
        """Nothing is compared where the majority is known: no right answer, or more of them than of all others."""
        monkeypatch.setattr(workers, "read", lambda tasks: [] if not tasks else pytest.fail("compared"))
        rows = [["x+5", "5+x", "y"], ["y", "y", "x+5", "5+x"], ["y"], [None, None]]
        scores = [[0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0], [None], [0.0, 0.0]]
        assert as_votes(rows, scores) == [["x+5", "5+x", "y"], ["y", "y", "y", "5+x"], ["y"], [None, None]]


def test_the_table_of_forms():
    """docs/evaluation.md says which forms count; its columns of other packages come from benchmarks/harness.py."""
    page = (ROOT / "docs" / "evaluation.md").read_text("utf-8")
    rows = re.findall(r"^\| `(.+?)` \| `(.+?)` \| ([01]) \| ([01]) \| [01] \| [01] \|", page, re.MULTILINE)
    assert len(rows) > 10
    for completion, gold, strict, lenient in rows:
        text = completion.replace(" ⏎ ", "\n")
        assert (score(text, gold), score(text, gold, lenient=True)) == (float(strict), float(lenient)), completion


def test_missing_package(monkeypatch):
    """Without math-verify the message holds the pip command."""
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(MissingExtraError, match=r"pip install -e '\.\[eval\]'"):
        math_accuracy(["Answer: 7"], answer=["7"])
