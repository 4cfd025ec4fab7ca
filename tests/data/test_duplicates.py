# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Evaluation problems that are in the training data are found, and others are not."""

import json
import random
import time

import pytest

from omniopd_trl.cli.main import main
from omniopd_trl.data.duplicates import NearDuplicate, near_duplicates
from omniopd_trl.data.sets import BENCHMARKS

PROBLEM = "Let $a$ and $b$ be positive integers with $a + b = 10$. Find the largest value of the product $ab$."
OTHER = "A train leaves the station at noon and travels 60 miles per hour. How far does it go in three hours?"
# A set where the wording is common and the numbers are the problem.
SUMS = [f"State the final answer to the following problem: {a} + {b} =" for a in range(10, 30) for b in range(40, 60)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """What `datasets` prepares from local files stays in the test's folder."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


class TestNearDuplicates:
    """`near_duplicates`."""

    @pytest.mark.parametrize(
        "copy",
        [
            PROBLEM,
            PROBLEM.upper().replace("$", "").replace(".", " . "),
            f"Solve the following problem step by step.\n\n{PROBLEM}\n\nPut the answer into a box.",
            PROBLEM.replace("positive integers", "whole numbers"),
            PROBLEM.replace("Find the largest value", "What is the maximum value"),
        ],
    )
    def test_copies(self, copy):
        """A copy is found in other letters, inside of instructions, and with a few other words."""
        (pair,) = near_duplicates([OTHER, copy, OTHER], [OTHER[::-1], PROBLEM])
        assert (pair.evaluation, pair.training, pair.others) == (1, 1, 0)
        assert 0.8 <= pair.similarity <= 1

    @pytest.mark.parametrize("other", [OTHER, "", "Find the largest value.", " ".join(sorted(PROBLEM.split()))])
    def test_others(self, other):
        """Another problem, a part of it, or its words in another order are none."""
        assert not near_duplicates([other], [PROBLEM])

    def test_numbers_count(self):
        """Where all problems have one wording, only the same numbers make a duplicate."""
        random.Random(0).shuffle(SUMS)
        pairs = near_duplicates(SUMS[100:], [*SUMS[:100], SUMS[250]])
        assert pairs == [NearDuplicate(100, 150, 1.0, 0)]

    def test_other_numbers(self):
        """A problem of which only the numbers differ is reported, and so is one with a word in five replaced."""
        near = OTHER.replace("60", "75").replace("three", "4").replace("noon", "1").replace("A train", "Some train")
        (pair,) = near_duplicates([near], [PROBLEM, OTHER])
        assert (pair.evaluation, pair.similarity) == (1, 17 / 21)
        text = [f"word{i}".translate(str.maketrans("0123456789", "abcdefghij")) for i in range(100)]
        other = [f"new{word}" if i % 5 == 2 else word for i, word in enumerate(text)]
        assert near_duplicates([" ".join(other)], [" ".join(text)])[0].similarity == 0.8

    @pytest.mark.parametrize(
        ("problem", "near"),
        [
            ("小明有3个苹果，又买了6个，现在有几个苹果？", "小明有3个苹果,又买了5个,现在有几个苹果?"),
            ("太郎はりんごを4個持っています。全部で何個ですか。", "太郎はりんごを3個持っています。全部で何個ですか。"),
            ("สมชายมีแอปเปิล 3 ลูก ซื้อเพิ่มอีก 5 ลูก", "สมชายมีแอปเปิล 4 ลูก ซื้อเพิ่มอีก 6 ลูก"),
        ],
    )
    def test_scripts_without_spaces(self, problem, near):
        """Their letters are compared, since a sentence would be one word."""
        (pair,) = near_duplicates(["一个正方形的边长是4厘米，求周长。", near], [problem])
        assert pair.training == 1

    def test_repetitions(self):
        """The most similar row is named, and the number of others counted."""
        near = PROBLEM.replace("positive", "natural")
        assert near_duplicates([near, PROBLEM, near, OTHER], [PROBLEM]) == [NearDuplicate(0, 1, 1.0, 2)]

    def test_threshold(self):
        """The threshold is the share of the words: 2 of 22 differ."""
        near = PROBLEM.replace("positive integers", "whole numbers")
        assert len(near_duplicates([near], [PROBLEM], 0.9)) == 1
        assert not near_duplicates([near], [PROBLEM], 0.92)

    def test_linear(self):
        """The time grows with the number of rows and not with the product of both sets."""
        draw = random.Random(0)
        words = [f"w{i}" for i in range(3000)]

        def problems(count):
            return [" ".join(draw.choices(words, k=40)) for _ in range(count)]

        evaluation, training = problems(500), problems(2000)
        training[7] = evaluation[3]
        start = time.process_time()
        assert [(p.evaluation, p.training) for p in near_duplicates(training, evaluation)] == [(3, 7)]
        assert time.process_time() - start < 2


class TestCommand:
    """`omniopd data`."""

    @pytest.fixture
    def files(self, tmp_path):
        def write(name, rows):
            path = tmp_path / name
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            return str(path)

        texts = (OTHER, PROBLEM, "\x1b[2J" + PROBLEM)
        train = write("train.jsonl", [{"prompt": [{"role": "user", "content": text}]} for text in texts])
        return train, write("aime.jsonl", [{"problem": p, "answer": "25", "id": "7"} for p in (OTHER[::-1], PROBLEM)])

    def test_check(self, files, capsys):
        """The report names both rows with their texts and counts them; a text does not control the terminal."""
        train, test = files
        assert main(["data", "check", train, f"aime_2025@{test}"]) == 0
        out = capsys.readouterr().out
        assert f"1.00  aime_2025@{test} row 1: Let $a$ and $b$" in out
        assert f"{train} row 1, and 1 other rows: Let $a$" in out
        assert out.endswith(
            f"1 of 2 problems of aime_2025@{test} are near-duplicates of the 3 problems of {train} (similarity of at "
            "least 0.8).\n"
        )
        assert "\x1b" not in out

    def test_json(self, files, capsys):
        """As JSON, each pair has both texts in full."""
        main(["data", "check", *files, "--json"])
        (pair,) = json.loads(capsys.readouterr().out)
        assert pair["evaluation_text"] == pair["training_text"] == PROBLEM
        assert (pair["evaluation"], pair["training"], pair["others"]) == (1, 1, 1)

    def test_mistakes(self, files, capsys):
        """A split or a file that is not there is one line."""
        assert main(["data", "check", *files, "--train_split", "dev"]) == 1
        assert "no split 'dev'" in capsys.readouterr().err
        assert main(["data", "check", "nowhere.jsonl", files[1]]) == 1
        assert "no dataset file 'nowhere.jsonl'" in capsys.readouterr().err
        with pytest.raises(SystemExit):
            main(["data", "check", *files, "--threshold", "2"])

    def test_list(self, capsys):
        """All named sets are listed."""
        assert main(["data", "list"]) == 0
        out = capsys.readouterr().out
        for name in BENCHMARKS:
            assert f"{name} " in out
