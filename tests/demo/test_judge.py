# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The judge of the demo: what is right, how it answers a question, and the teacher `demo:judge` in an audit."""

import asyncio
import operator
import random
import re
from collections import Counter
from itertools import islice

import pytest
import torch
from transformers import AutoTokenizer

from omniopd_trl.audits.auditor import Auditor
from omniopd_trl.audits.types import PolicyScores, Trajectory
from omniopd_trl.demo import JUDGE, asset_path
from omniopd_trl.demo import judge as judging
from omniopd_trl.demo.judge import is_right, write_marks
from omniopd_trl.demo.world import STUDENT_SLIP, finished_solution, mixed_solution, problems, read_problem, solution
from omniopd_trl.method import get_similarity
from omniopd_trl.teachers import Prefix, SamplingRequest, load_teacher
from omniopd_trl.teachers.instruct.judge import Passage, parse_marks, render_again, render_question
from tests.support.audits import audit_settings

PROBLEMS = list(islice(problems("judge"), 60))
CALCULATE = {"+": operator.add, "-": operator.sub, "*": operator.mul}
MIA = read_problem(
    "Mia has 27 stickers. Mia finds 24 stickers. Mia gives away 3 bags of 5 stickers. How many stickers does Mia have "
    "now?"
)


@pytest.fixture(scope="module")
def teacher():
    return load_teacher(JUDGE)


@pytest.fixture
def careful(monkeypatch):
    """A judge that is never wrong."""
    for name in ("WRONG", "UNDECIDED", "INTRODUCED"):
        monkeypatch.setattr(judging, name, 0.0)


def test_a_begun_solution_is_finished_as_by_its_writer():
    """Against the world's own writer, who knows the slips: at each cut of a solution with slips, the same text."""
    for problem in PROBLEMS[:5]:
        assert read_problem(problem.question) == problem
        text = solution(problem, "student", STUDENT_SLIP, random.Random(3))
        for cut in range(len(text) + 1):
            written, rest = mixed_solution(problem, cut, "student", "student", STUDENT_SLIP, random.Random(3))
            # A wrong number that may go on is not taken for a result yet.
            if not re.search(r"= \d+$|Answer: \d+$", written):
                assert finished_solution(problem, written) == written + rest


@pytest.mark.parametrize("question", ["", "2 + 2?", "Mia has 27 stickers. How many?", PROBLEMS[0].question + "!"])
def test_other_questions(question):
    assert read_problem(question) is None
    assert "demo's problems" in write_marks(render_question(question, [Passage("", "4", ("4",))]))
    assert "demo's problems" in write_marks([{"role": "system", "content": ""}, {"role": "user", "content": ""}])


BEGUN = "Mia starts with 27 stickers.\nMia finds 24: 27 + 24 = "


@pytest.mark.parametrize(
    ("before", "text", "right"),
    [
        (BEGUN, "51, so Mia has 51 stickers", True),
        (BEGUN, "5", True),
        (BEGUN, "51, so Mia has 41", False),
        (BEGUN, "41, so Mia has 41 stickers", False),
        (BEGUN, "", False),
        (BEGUN, "\n", False),
        (BEGUN + "41", ", so Mia has 41 stickers.\nMia gives", True),
        (BEGUN + "41", ", so Mia has 51 stickers", False),
        (BEGUN + "4", "1, so Mia has 41 stickers", False),
        # A result that was wrong before is kept, and what follows is calculated from it.
        (BEGUN + "41, so Mia has 41 stickers.\nMia gives away 3 bags: ", "3 * 5 = 15", True),
        (
            BEGUN + "41, so Mia has 41 stickers.\nMia gives away 3 bags: 3 * 5 = 15, so that is 15 stickers.\n",
            "Mia gives away 15: 41 - 15 = 26, so",
            True,
        ),
        # Lines before do not count, and the one that the text begins in does.
        ("Mia starts with 28 stickers.\n", "Mia finds 24: 27 + 24 = 51", True),
        ("Mia starts with 28", " stickers.\n", False),
        ("", "Tom starts with 27", False),
    ],
)
def test_what_is_right(before, text, right):
    assert is_right(MIA, before, text) == right


def test_the_end_must_be_complete():
    whole = solution(MIA, "student")
    assert is_right(MIA, whole[:-9], whole[-9:], is_end=True)
    assert not is_right(MIA, whole[:-9], whole[-9:-1], is_end=True)
    assert is_right(MIA, whole[:-9], whole[-9:-1])
    assert not is_right(MIA, whole[:-9], whole[-9:] + "\nAnswer: 36")


def test_a_question_with_chunks_and_forks(careful):
    """Passages and candidates have the marks of their own places, also where tags have other names."""
    passages = [
        Passage("Mia starts with ", "27 stickers", ("27 stickers",)),
        Passage(".\nMia finds 24: 27 + 24 = ", "41", (" 41", "41", "51")),
        Passage(", so Mia has 41 stickers.\nMia gives away 3 bags: ", "3 * 5 = 16", ("3 * 5 = 16",)),
        Passage(", so that is ", "16 <passage>", ("15", "16", "16 <passage>")),
    ]
    question = render_question(MIA.question, passages)
    assert '<passage-2 number="1">' in question[1]["content"]
    assert parse_marks(write_marks(question), 8) == [1, 0, 0, 1, 0, 0, 1, 0]
    last = [Passage(solution(MIA, "student")[:-2], "3", ("3",))]
    assert write_marks(render_question(MIA.question, last)) == "1: 0"
    assert write_marks(render_question(MIA.question, last, "6")) == "1: 10"


def test_how_often_it_is_wrong():
    """Shares of 2,000 marks and 400 answers, within four standard errors. The same question has the same answer."""
    marks, introduced = Counter(), 0
    texts = [str(number) for number in range(51, 56)]
    for number in range(400):
        problem = PROBLEMS[number % len(PROBLEMS)]
        begun = f"{problem.name} starts with {number}"
        question = render_question(problem.question, [Passage(begun, text, (text,)) for text in texts])
        answer = write_marks(question)
        assert write_marks(question) == answer
        introduced += answer.startswith("Here are the marks:")
        corrected = write_marks(render_again(question, answer, len(texts)))
        assert corrected == answer.removeprefix("Here are the marks:\n")
        marks.update(parse_marks(corrected, len(texts)))
    for found, share, total in (
        (marks[1.0], judging.WRONG, 2000),
        (marks[0.5], judging.UNDECIDED, 2000),
        (introduced, judging.INTRODUCED, 400),
    ):
        assert abs(found / total - share) < 4 * (share * (1 - share) / total) ** 0.5


def test_a_cascade_of_the_teacher(teacher):
    """Marks are right or wrong by the numbers in the text, and the model writes rollouts where they are in between."""
    tokenizer = AutoTokenizer.from_pretrained(asset_path("student"))
    settings = audit_settings(
        signal="cascade", cascade_low=0.3, cascade_high=0.7, num_chunks=2, chunk_length=10, num_rollouts=2
    )
    auditor = Auditor(teacher, tokenizer, settings, get_similarity("exact"))
    found, answers = Counter(), 0
    for seed, problem in enumerate(PROBLEMS[:24]):
        text = solution(problem, "student", STUDENT_SLIP, random.Random(seed))
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        results = {match.end() for match in re.finditer(" = ", text)}
        entropy = torch.tensor([float(start in results) for start, _ in encoded["offset_mapping"]])
        prompt = [{"role": "user", "content": problem.question}]
        trajectory = Trajectory(prompt, [0], encoded["input_ids"], seed=seed)
        audit = asyncio.run(auditor.audit(trajectory, PolicyScores(-entropy, entropy, -entropy)))
        assert len(audit.chunks) == 2
        assert not audit.failures
        answers += len(audit.answers)
        for chunk in audit.chunks:
            line = (chunk.prefix + chunk.text).split("\n")[chunk.prefix.count("\n")]
            left, sign, right, result = re.search(r"(\d+) ([+*-]) (\d+) = (\d+)", line).groups()
            found[CALCULATE[sign](int(left), int(right)) == int(result), chunk.mark] += 1
            assert len(chunk.rollouts) == (2 if chunk.mark == 0.5 else 0)
        assert audit.outcomes.get("malformed", 0) == len(audit.answers) - 1
        assert audit.usage.prompt_tokens > 1000 * len(audit.answers)
    assert answers > 24
    assert found[True, 1.0] + found[False, 0.0] >= 0.65 * found.total()
    assert found[True, 0.5] + found[False, 0.5] > 0
    assert found[False, 0.0] > 5


def test_tokens_are_counted_and_answers_are_cut(teacher):
    question = render_question(MIA.question, [Passage(BEGUN, "51", ("51",)), Passage(", so", " Mia", (" Mia",))])
    problem = [{"role": "user", "content": MIA.question}]
    # An evaluation of the teacher asks a problem as a question, too: the model answers it.
    prefixes = [Prefix(question, is_question=True), Prefix(problem, is_question=True), Prefix(problem, BEGUN)]
    answer, solved, continued = asyncio.run(teacher.sample(prefixes, SamplingRequest(2, 40, temperature=0.0)))
    assert solved.rollouts[0].text.startswith("Let us count the stickers.\n- Begin with 27.")
    assert {rollout.text for rollout in answer.rollouts} == {write_marks(question)}
    assert len(answer.rollouts) == len(continued.rollouts) == 2
    assert continued.rollouts[0].text.startswith("51")
    tokens = teacher.tokenizer.apply_chat_template(question, add_generation_prompt=True)["input_ids"]
    ids = teacher.tokenizer(write_marks(question))["input_ids"]
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(tokens), len(ids) + 1)
    (cut,) = asyncio.run(teacher.sample(prefixes[:1], SamplingRequest(1, 3)))
    assert cut.rollouts[0].text == teacher.tokenizer.decode(ids[:3])
    assert (cut.rollouts[0].finish_reason, cut.usage.completion_tokens) == ("length", 3)
