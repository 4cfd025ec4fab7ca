# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Evaluations without a trainer: hand-computed metrics, samples that depend on nothing but their seed, resuming."""

import json
import re
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from omniopd_trl.cli.main import main
from omniopd_trl.errors import BudgetError, ConfigError, DataError, TeacherError
from omniopd_trl.evals.evaluate import EvalSettings, evaluate
from omniopd_trl.evals.math import math_accuracy
from omniopd_trl.evals.results import EvalResult, compare, table_of, table_of_comparison
from omniopd_trl.journal.reader import spent
from omniopd_trl.teachers import ScriptedTeacher
from omniopd_trl.teachers.context import TeacherContext
from omniopd_trl.teachers.options import TeacherOptions
from tests.support.commands import ENVIRONMENT
from tests.support.loopback import Fault, Loopback, wire
from tests.support.loopback.teachers import KEYS, SERVICES, services  # noqa: F401 (a fixture)
from tests.support.services import Scripted

SUMS = Dataset.from_list([{"prompt": f"{n} + {n} =", "answer": str(2 * n)} for n in range(6)])
FOUR = EvalSettings(num_samples=4, max_tokens=24)


# All right; two right; one right, in the minority; refused, a calculation, nothing, wrong.
TEXTS = [
    ["Answer: 0"] * 4,
    ["Answer: 2", "so Answer: 3", "Answer: 2.0", "Answer: 4"],
    ["Answer: 4", "Answer: 5", "Answer: 5", "Answer: 7"],
    [None, "Answer: 3 + 3", "no idea", "Answer: 7"],
]


def script(prefix, index):
    return TEXTS[int(prefix.prompt.split()[0])][index]


@pytest.fixture
def result(tmp_path):
    return evaluate(ScriptedTeacher(script), dataset=SUMS.select(range(4)), settings=FOUR, output_dir=tmp_path / "a")


def test_a_column_that_the_model_sees(tmp_path, tiny_model_dir, capsys):
    """The prompts hold it, the problems stay the same, and the result says so."""
    seen = []
    context = TeacherContext("answer", "(= {context}) {prompt}")

    def answer(prefix, index):
        seen.append(prefix.prompt)
        return "Answer: 2"

    known = evaluate(ScriptedTeacher(answer), dataset=SUMS, settings=FOUR, output_dir=tmp_path / "a", context=context)
    assert set(seen) == {f"(= {2 * n}) {n} + {n} =" for n in range(6)}
    plain = evaluate(ScriptedTeacher(["Answer: 2"]), dataset=SUMS, settings=FOUR)
    assert compare(known, plain).num_problems == 6
    assert "in its prompt" in table_of(known)
    assert "in its prompt" not in table_of(plain)
    with pytest.raises(ConfigError, match="holds an evaluation"):  # not the samples of this evaluation
        evaluate(ScriptedTeacher(answer), dataset=SUMS, settings=FOUR, output_dir=tmp_path / "a")
    SUMS.to_json(tmp_path / "sums.jsonl")
    command = ["eval", "--model", "scripted", "--dataset", str(tmp_path / "sums.jsonl"), "--num_samples", "1"]
    command += ["--max_completion_length", "8", "--output_dir", str(tmp_path / "b"), "--with_teacher_context"]
    assert main(command) == 2
    assert "add `--teacher_context_column NAME`" in capsys.readouterr().err
    assert main([*command, "--teacher_context_column", "answer"]) == 0
    assert "the column 'answer'" in capsys.readouterr().out


def test_a_model_that_cannot_be_loaded(tmp_path, capsys):
    """It may be a student, so it is not called a teacher."""
    command = ["eval", "--model", "no/model", "--dataset", "demo:problems", "--output_dir", str(tmp_path / "a")]
    assert main([*command, "--max_completion_length", "8"]) == 1
    error = capsys.readouterr().err
    assert "DataError: The model 'no/model' cannot be loaded: there is no such folder." in error
    assert "teacher" not in error


class TestMetrics:
    """Every number is one that can be computed by hand."""

    def test_values(self, result):
        # A refused sample comes last: a service does not say which one it was.
        assert [p.scores for p in result.problems] == [[1] * 4, [1, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
        assert result.problems[1].answers == ["2", "3", "2", "4"]
        assert result.problems[3].answers == [None, None, "7", None]
        assert result.problems[3].answered == [True, True, True, False]
        metrics = result.metrics
        assert metrics["pass@1"] == 7 / 16
        assert metrics["pass@2"] == pytest.approx((1 + 5 / 6 + 1 / 2 + 0) / 4)
        assert metrics["pass@4"] == 3 / 4
        assert metrics["majority@4"] == 2 / 4
        assert metrics["without_answer"] == 3 / 16
        assert metrics["not_given"] == 1 / 16
        assert metrics["truncated"] == 0
        assert metrics["mean_tokens"] == (8 + 9 + 8 + 8) / 16
        lengths = [len(text) for texts in TEXTS for text in texts if text is not None]
        assert metrics["mean_characters"] == sum(lengths) / 16
        # Of all 4^4 resamples of the problems, equally likely.
        means = [sum(sample) / 4 for sample in product([1, 1 / 2, 1 / 4, 0], repeat=4)]
        assert metrics["interval"] == np.quantile(means, [0.025, 0.975]).tolist() == [0.125, 0.8125]

    def test_the_table_and_the_files(self, result, tmp_path):
        text = table_of(result)
        assert "pass@1                      0.438, 95% interval 0.125 to 0.812" in text
        assert "refused, filtered or empty  0.062" in text
        assert "0.188 (strict reading)" in text
        loaded = EvalResult.load(tmp_path / "a")
        assert loaded == result
        stored = json.loads((tmp_path / "a" / "results.json").read_text())
        assert (stored["schema"], stored["metrics"]["pass@1"]) == (1, 7 / 16)
        lines = [json.loads(line) for line in (tmp_path / "a" / "samples.jsonl").read_text().splitlines()]
        assert [len(line["samples"]) for line in lines] == [4] * 4
        assert {line["prompt"] for line in lines} == {f"{n} + {n} =" for n in range(4)}

    def test_problems_without_a_right_answer_are_left_out(self):
        rows = Dataset.from_list([{"prompt": "1 1", "answer": "2"}, {"prompt": "1 2", "answer": "no number"}])
        metrics = evaluate(ScriptedTeacher(["Answer: 2"]), dataset=rows, settings=FOUR).metrics
        assert (metrics["num_problems"], metrics["num_not_scored"], metrics["pass@1"]) == (1, 1, 1.0)

    def test_equal_formulas_vote_together(self):
        texts = ["Answer: x + 1", r"Answer: $2\sqrt{3}$", r"Answer: $\sqrt{12}$", "Answer: 2"]
        rows = Dataset.from_list([{"prompt": "?", "answer": "1 + x"}])
        metrics = evaluate(ScriptedTeacher(texts), dataset=rows, settings=FOUR).metrics
        assert (metrics["pass@1"], metrics["majority@4"]) == (1 / 4, 0)

    def test_a_custom_function(self):
        """Graded scores have a mean, and no pass@2. It gets the columns of its sample, and may be asynchronous."""

        async def length(completions, answer, **kwargs):
            return [len(text) / 100 + int(a) for text, a in zip(completions, answer, strict=True)]

        result = evaluate(ScriptedTeacher(["ab"]), dataset=SUMS.select([1]), settings=FOUR, reward_funcs=length)
        assert result.metrics["pass@1"] == pytest.approx(2.02)
        assert not {"pass@2", "majority@4", "without_answer"} & result.metrics.keys()

    def test_several_functions(self, tmp_path):
        """The first one is pass@1. All have the names that the trainer's evaluation gives them."""

        def even(completions, **kwargs):
            return [None if text.endswith("2") else len(text) % 2 for text in completions]

        funcs = [math_accuracy, even]
        result = evaluate(
            ScriptedTeacher(script),
            dataset=SUMS.select(range(3)),
            settings=FOUR,
            reward_funcs=funcs,
            output_dir=tmp_path,
        )
        assert result.metrics["pass@1"] == result.metrics["pass@1/math_accuracy"] == 7 / 12
        assert result.problems[1].rewards["pass@1/even"] == [None, 0, 1, 1]
        assert result.metrics["pass@1/even"] == 10 / 11
        assert "pass@1/even" in table_of(EvalResult.load(tmp_path))

    def test_a_function_that_cannot_be_called(self, tmp_path):
        """It is refused before anything is generated."""
        with pytest.raises(ConfigError, match="cannot be called"):
            evaluate(ScriptedTeacher(script), dataset=SUMS, reward_funcs=lambda prompts: [], output_dir=tmp_path / "a")
        assert not (tmp_path / "a").exists()


class TestCompare:
    """Two results on the same problems."""

    def test_by_hand(self, result):
        better = evaluate(
            ScriptedTeacher(lambda prefix, index: f"Answer: {2 * int(prefix.prompt.split()[0])}"),
            dataset=SUMS.select([3, 1, 0, 2]),
            settings=EvalSettings(num_samples=2, max_tokens=24),
        )
        comparison = compare(better, result)
        assert (comparison.first, comparison.second) == (1.0, 7 / 16)
        assert (comparison.num_better, comparison.num_worse, comparison.num_problems) == (3, 0, 4)
        assert comparison.test.p_value == 2 / 8  # of the sign patterns of three differences
        assert comparison.differences["num_samples"] == (2, 4)
        assert "+0.562" in table_of_comparison(comparison, ("new", "old"))

    def test_problems_are_paired(self, result):
        """Whatever their order."""
        again = evaluate(ScriptedTeacher(script), dataset=SUMS.select([3, 1, 0, 2]), settings=FOUR)
        comparison = compare(again, result)
        assert (comparison.num_better, comparison.num_worse, comparison.test.interval) == (0, 0, (0.0, 0.0))

    def test_other_problems(self, result):
        other = evaluate(ScriptedTeacher(script), dataset=SUMS.select([0, 1]), settings=FOUR)
        with pytest.raises(DataError, match="2 are in the first only, 0 in the second only, and 2 in both"):
            compare(result, other)

    def test_another_prompt_for_the_same_problem(self):
        """With an `id`, the prompt may differ. Equal ids of other sets have other answers."""
        first, second, third = (
            evaluate(ScriptedTeacher(["Answer: 2"]), dataset=Dataset.from_list([row]), settings=FOUR)
            for row in (
                {"id": "1", "prompt": "one and one", "answer": "2"},
                {"id": "1", "prompt": "1 + 1", "answer": "2"},
                {"id": "1", "prompt": "1 + 1", "answer": "3"},
            )
        )
        assert compare(first, second).differences.keys() == {"problems"}
        with pytest.raises(DataError, match="0 in both"):
            compare(first, third)

    def test_what_is_no_result(self, tmp_path):
        with pytest.raises(DataError, match=r"no result .*No such file"):
            EvalResult.load(tmp_path)
        (tmp_path / "results.json").write_text('{"schema": 7}')
        with pytest.raises(DataError, match="schema 7"):
            EvalResult.load(tmp_path)
        (tmp_path / "results.json").write_text("[]")
        with pytest.raises(DataError, match="no result"):
            EvalResult.load(tmp_path)


def texts_of(folder):
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    return {line["prompt"]: [sample["text"] for sample in line["samples"]] for line in lines}


class TestModelsInThisProcess:
    """Their samples depend on the seed, the prompt and the index only."""

    @pytest.fixture
    def model(self, tiny_model_dir):
        return AutoModelForCausalLM.from_pretrained(tiny_model_dir), AutoTokenizer.from_pretrained(tiny_model_dir)

    def test_batches_order_and_subsets_do_not_matter(self, model, tmp_path):
        for name, dataset, changes in (
            ("all", SUMS, {}),
            ("small batches", SUMS, {"max_batch_tokens": 40}),
            ("reversed", SUMS.select([5, 4, 3]), {}),
            ("other seed", SUMS, {"seed": 1}),
        ):
            settings = EvalSettings(num_samples=4, max_tokens=24, **changes)
            evaluate(*model, dataset, settings=settings, output_dir=tmp_path / name)
        first = texts_of(tmp_path / "all")
        assert len({text for samples in first.values() for text in samples}) == 24
        assert texts_of(tmp_path / "small batches") == first
        part = texts_of(tmp_path / "reversed")
        assert len(part) == 3
        assert part.items() <= first.items()
        assert all(other != first[prompt] for prompt, other in texts_of(tmp_path / "other seed").items())

    def test_an_instance_is_left_as_it_was(self, model):
        """A student in training stays in training mode, and trainable; the global generator is not used."""
        student, tokenizer = model
        student.train()
        student.model.embed_tokens.weight.requires_grad_(False)
        before, state = [w.requires_grad for w in student.parameters()], torch.get_rng_state()
        evaluate(student, tokenizer, SUMS, settings=EvalSettings(num_samples=1, max_tokens=4))
        assert student.training
        assert [w.requires_grad for w in student.parameters()] == before
        assert torch.equal(torch.get_rng_state(), state)

    def test_a_context_that_is_too_short_is_refused(self, model):
        with pytest.raises(ConfigError, match=r"max_tokens=250.*context of 256. Lower it to at most 24\d"):
            evaluate(*model, SUMS, settings=EvalSettings(max_tokens=250))
        long = Dataset.from_list([{"prompt": "1 " * 300, "answer": "1"}])
        with pytest.raises(ConfigError, match=r"context of 256\. Remove such prompts"):
            evaluate(*model, long, settings=EvalSettings(max_tokens=1))

    def test_other_weights_are_refused_in_the_same_folder(self, model, tmp_path):
        settings = EvalSettings(num_samples=1, max_tokens=4)
        evaluate(*model, SUMS, settings=settings, output_dir=tmp_path)
        with torch.no_grad():
            model[0].model.norm.weight += 0.5
        with pytest.raises(ConfigError, match=r"holds an evaluation with weights=.*Choose another output_dir"):
            evaluate(*model, SUMS, settings=settings, output_dir=tmp_path)


class TestRefused:
    """In one line, before anything is generated."""

    @pytest.mark.parametrize(
        ("dataset", "words"),
        [
            (None, "needs a `datasets.Dataset`"),
            (SUMS.rename_column("prompt", "question"), "no column `prompt`"),
            (SUMS.rename_column("answer", "gold"), "neither a column `answer` nor `solution`"),
            (SUMS.select([0, 1, 0]), "Row 2 of the dataset repeats row 0"),
            (SUMS.add_column("image", ["x"] * len(SUMS)), "images and tools are not supported yet"),
            (
                SUMS.map(lambda row, i: {"prompt": row["prompt"] * (i < 3)}, with_indices=True),
                "Row 3 .* empty or blank",
            ),
            (SUMS.map(lambda row: {"answer": "none"}), "None of 6 problems has a right answer"),
        ],
    )
    def test_datasets(self, dataset, words):
        """A model is not even loaded: this one is not there."""
        with pytest.raises(DataError, match=words):
            evaluate("./no-model", dataset=dataset)

    @pytest.mark.parametrize(
        "change", [{"num_samples": 0}, {"top_p": 0.0}, {"temperature": float("nan")}, {"seed": -1}]
    )
    def test_settings(self, change):
        with pytest.raises(ConfigError, match=next(iter(change))):
            EvalSettings(**change)

    def test_the_folder_of_a_run(self, tmp_path):
        (tmp_path / "_audits").mkdir()
        (tmp_path / "_audits" / "rank-0.sqlite").touch()
        with pytest.raises(ConfigError, match="folder of a training run"):
            evaluate(ScriptedTeacher(script), dataset=SUMS, output_dir=tmp_path)


class TestResume:
    """What is there is not generated again, and what was paid for is not paid for again."""

    def test_a_line_that_was_not_finished(self, result, tmp_path):
        """It is removed, and its problem is asked again; a damaged line is an error."""
        file = tmp_path / "a" / "samples.jsonl"
        whole = file.read_bytes()
        file.write_bytes(whole[:-20])
        asked = []

        def noted(prefix, index):
            asked.append(prefix.prompt)
            return script(prefix, index)

        dataset = SUMS.select(range(4))
        again = evaluate(ScriptedTeacher(noted), dataset=dataset, settings=FOUR, output_dir=tmp_path / "a")
        assert set(asked) == {"3 + 3 ="}
        assert again == result
        assert file.read_bytes() == whole
        file.write_bytes(b"{]\n" + whole)
        with pytest.raises(DataError, match="Line 1 of"):
            evaluate(ScriptedTeacher(noted), dataset=dataset, settings=FOUR, output_dir=tmp_path / "a")

    def test_another_reading_scores_the_same_samples(self, result, tmp_path):
        lenient = EvalSettings(num_samples=4, max_tokens=24, lenient=True)
        dataset = SUMS.select(range(4))
        again = evaluate(
            ScriptedTeacher(["never asked"]), dataset=dataset, settings=lenient, output_dir=tmp_path / "a"
        )
        assert again.metrics["pass@1"] == 8 / 16

    def test_other_settings_are_refused(self, result, tmp_path):
        dataset = SUMS.select(range(4))
        with pytest.raises(ConfigError, match="with max_tokens=24, and now it is 30"):
            changed = EvalSettings(num_samples=4, max_tokens=30)
            evaluate(ScriptedTeacher(script), dataset=dataset, settings=changed, output_dir=tmp_path / "a")
        with pytest.raises(ConfigError, match="with problems="):
            evaluate(ScriptedTeacher(script), dataset=SUMS, settings=FOUR, output_dir=tmp_path / "a")


OPENAI = SERVICES[1]
PRICES = {"teacher_input_price": 1.0, "teacher_output_price": 1.0}
CHATS = Dataset.from_list(
    [{"prompt": [{"role": "user", "content": f"What is {n} + {n}?"}], "answer": str(2 * n)} for n in range(5)]
)
TWO = EvalSettings(num_samples=2, max_tokens=10)


def answer_sums(monkeypatch):
    def text_of(messages, index):
        number = int(re.search(r"What is (\d+)", messages[-1]["content"])[1])
        return f"Answer: {2 * number + index}"

    monkeypatch.setattr(wire, "text_of", text_of)


def ask(server, folder, **options):
    options = TeacherOptions(teacher_base_url=server.url + OPENAI.path, **{**PRICES, **options})
    return evaluate(OPENAI.name, dataset=CHATS, settings=TWO, output_dir=folder, options=options)


def test_problems_of_a_large_set_wait_without_their_requests():
    """No more problems than slots are in progress: the requests of all of them would take gigabytes."""
    counts = [0]

    class Counted(Scripted):
        async def sample(self, prefixes, request):
            counts.append(counts[-1] + 1)
            try:
                return await super().sample(prefixes, request)
            finally:
                counts.append(counts[-1] - 1)

    teacher = Counted(most=3)
    rows = Dataset.from_list([{"prompt": f"{n} + {n} =", "answer": str(2 * n)} for n in range(40)])
    assert evaluate(teacher, dataset=rows, settings=FOUR).metrics["num_problems"] == 40
    assert (len(teacher.seen), teacher.most, max(counts)) == (40, 3, 3)


@pytest.mark.usefixtures("services")
class TestServices:
    """Real adapters, over loopback."""

    def test_scores_cost_and_seeds(self, tmp_path, monkeypatch):
        answer_sums(monkeypatch)
        with Loopback(OPENAI.answer) as server:
            result = ask(server, tmp_path)
            assert result.metrics["pass@1"] == 0.5
            assert result.metrics["truncated"] == 1.0
            assert result.cost["prompt_tokens"] == 100
            assert result.cost["usd"] == pytest.approx(sum((20 + 6, 20 + 6, 20 + 6, 20 + 6, 20 + 6)) / 1e6)
            assert {body["seed"] for body in server.bodies} == {0}
            # The problem itself, although this model is instructed where it continues a text.
            assert all(body["messages"] in CHATS["prompt"] for body in server.bodies)
            again = ask(server, tmp_path)
            assert len(server.bodies) == 5
        assert again == result

    def test_the_programs_of_a_recipe_for_code(self, tmp_path, monkeypatch, capsys):
        """Its reward function runs them, as in the trainer's evaluation."""
        monkeypatch.chdir(tmp_path)
        tests = json.dumps({"inputs": ["1 2\n"], "outputs": ["3\n"]})
        rows = [{"prompt": [{"role": "user", "content": f"{word} two numbers"}], "tests": tests} for word in "AB"]
        Dataset.from_list(rows).to_json(tmp_path / "programs.jsonl")
        (tmp_path / "recipe.yaml").write_text(
            "model_name_or_path: openai:gpt-6-luna\ndataset_name: programs.jsonl\nmax_completion_length: 60\n"
            "reward_funcs: [omniopd_trl.evals.code.code_accuracy]\noutput_dir: run\n"
        )

        def program(messages, index):
            sign = "+" if messages[-1]["content"].startswith("A") else "-"
            return f"a, b = map(int, input().split()); print(a {sign} b)"

        monkeypatch.setattr(wire, "text_of", program)
        with Loopback(OPENAI.answer) as server:
            command = ["eval", "--config", "recipe.yaml", "--num_samples", "1", "--output_dir", "o", "--json"]
            code = main([*command, "--split", "train", "--teacher_base_url", server.url + OPENAI.path])
        captured = capsys.readouterr()
        if "SandboxError" in captured.err:
            pytest.skip(captured.err)
        assert code == 0, captured.err
        assert EvalResult.load("o").scores() == [[1.0], [0.0]]
        assert json.loads(captured.out)["settings"]["reward_funcs"] == ["code_accuracy"]

    def test_another_server_or_template_is_refused(self, tmp_path, monkeypatch):
        """Samples of two servers, or with and without a thought, must not get into one result."""
        answer_sums(monkeypatch)
        with Loopback(OPENAI.answer) as server, Loopback(OPENAI.answer) as other:
            thinks = {"teacher_chat_template_kwargs": {"enable_thinking": True}}
            first = ask(server, tmp_path / "a")
            with pytest.raises(ConfigError, match="with base_url="):
                ask(other, tmp_path / "a")
            with pytest.raises(ConfigError, match=r"with chat_template_kwargs=None, and now it is .*True"):
                ask(server, tmp_path / "a", **thinks)
            differences = compare(first, ask(other, tmp_path / "b", **thinks)).differences
        assert differences == {"chat_template_kwargs": (None, {"enable_thinking": True})}

    def test_a_budget_that_ends_keeps_what_was_answered(self, tmp_path, monkeypatch):
        """With a larger one the same command asks for the rest, and counts what was spent before."""
        answer_sums(monkeypatch)
        with Loopback(OPENAI.answer) as server:
            with pytest.raises(BudgetError, match="is used up"):
                ask(server, tmp_path, teacher_budget_tokens=620, teacher_max_concurrency=1)
            before = len(server.bodies)
            assert 0 < before < 5
            assert spent(tmp_path)[0].prompt_tokens == 20 * before
            result = ask(server, tmp_path, teacher_budget_tokens=100_000)
            assert len(server.bodies) == 5
        assert result.metrics["pass@1"] == 0.5
        assert result.cost["prompt_tokens"] == 100

    def test_a_problem_that_failed_is_asked_again(self, tmp_path, monkeypatch):
        """A failure of the service is no wrong answer: nothing is scored until it is there."""
        answer_sums(monkeypatch)

        def fault(number, body):
            failing = "2 + 2" in body["messages"][-1]["content"]
            return Fault(500, OPENAI.error(500, "broken")) if failing else None

        with Loopback(OPENAI.answer, fault=fault) as server:
            with pytest.raises(TeacherError, match=r"did not answer 1 of 5 problems: .*The others are kept"):
                ask(server, tmp_path, teacher_max_attempts=2)
            assert not (tmp_path / "results.json").exists()
            server.fault = None
            before = len(server.bodies)
            assert ask(server, tmp_path).metrics["pass@1"] == 0.5
            assert len(server.bodies) == before + 1

    def test_a_killed_evaluation_pays_for_nothing_twice(self, tmp_path, monkeypatch):
        """kill -9 while a request waits: only that one is sent again, and counted at its worst case."""
        answer_sums(monkeypatch)
        program = (
            "import sys; from tests.evals import test_evaluate as t; from types import SimpleNamespace as N;"
            "t.ask(N(url=sys.argv[1]), sys.argv[2], teacher_max_concurrency=1)"
        )
        with Loopback(OPENAI.answer, fault=lambda number, body: Fault(how="hang") if number == 3 else None) as server:
            process = subprocess.Popen(
                [sys.executable, "-c", program, server.url, tmp_path], env={**ENVIRONMENT, **KEYS}
            )
            deadline = time.monotonic() + 120
            while len(server.bodies) < 4 and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.02)
            process.kill()
            process.wait()
            assert len(server.bodies) == 4
            result = ask(server, tmp_path)
            assert len(server.bodies) == 4 + 2
        assert result.metrics["pass@1"] == 0.5
        sent = [body["messages"][-1]["content"] for body in server.bodies]
        assert sent[3] in sent[4:]
        assert len(set(sent)) == 5
        total, _ = spent(tmp_path)
        assert total.prompt_tokens + total.completion_tokens > 5 * 26


class TestCommand:
    """`omniopd eval`."""

    @pytest.fixture
    def problems(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        rows = [{"question": f"{n} + {n} =", "answer": str(2 * n)} for n in range(6)]
        (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return "problems.jsonl"

    def run(self, capsys, *options):
        code = main(["eval", *map(str, options)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    def test_two_models(self, problems, tiny_model_dir, make_tiny_model, capsys):
        """Two evaluations with options of the training command, and their comparison."""
        common = ("--dataset", problems, "--num_samples", 2, "--max_completion_length", 12, "--limit", 3)
        for name, model in (("a", tiny_model_dir), ("b", make_tiny_model(seed=3))):
            code, out, err = self.run(capsys, "--model", model, *common, "--output_dir", name, "--temperature", 0.7)
            assert code == 0, err
            assert re.search(r"problems x samples +3 x 2\n", out)
        settings = EvalResult.load("a").settings
        assert (settings["temperature"], settings["max_tokens"], settings["engine"]) == (0.7, 12, "transformers")
        code, out, err = self.run(capsys, "--compare", "a", "b")
        assert code == 0, err
        assert "pass@1 of a" in out
        code, out, _ = self.run(capsys, "--compare", "a", "b", "--json")
        assert json.loads(out)["num_problems"] == 3

    def test_a_recipe(self, problems, tiny_model_dir, tmp_path, capsys):
        """Its student, dataset, template, sampling and rewards; the options of the command override them."""
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(
            f"model_name_or_path: {tiny_model_dir}\nteacher_model_name_or_path: scripted\ndataset_name: {problems}\n"
            "prompt_template: 'Q: {question}'\nmax_completion_length: 8\noutput_dir: run\ndataset_test_split: train\n"
            "reward_funcs: [rewards_of_a_recipe.length]\ntop_k: 1\neval_lenient_answers: true\n"
        )
        (tmp_path / "rewards_of_a_recipe.py").write_text(
            "def length(completions, **kwargs):\n    return [len(c[0]['content']) for c in completions]\n"
        )
        common = ("--config", recipe, "--num_samples", 2, "--json")
        code, out, err = self.run(capsys, *common, "--output_dir", "o")
        assert code == 0, err
        shown = json.loads(out)
        assert shown["settings"].items() >= {"max_tokens": 8, "top_k": 1, "reward_funcs": ["length"]}.items()
        line = json.loads((tmp_path / "o" / "samples.jsonl").read_text().splitlines()[0])
        assert line["prompt"][0]["content"].startswith("Q: ")
        first, second = (sample["text"] for sample in line["samples"])
        assert first == second  # the most likely tokens
        assert shown["metrics"]["pass@1"] == shown["metrics"]["mean_characters"]
        assert shown["settings"]["lenient"] is False  # an option of math-verify, which scores nothing here
        assert not (tmp_path / "run").exists()
        # The same samples with other scores.
        code, out, err = self.run(
            capsys, *common, "--output_dir", "o", "--reward_funcs", "omniopd_trl.evals.math_accuracy", "--lenient"
        )
        assert code == 0, err
        assert json.loads(out)["metrics"]["pass@1"] == 0
        assert json.loads(out)["settings"].items() >= {"reward_funcs": ["math_accuracy"], "lenient": True}.items()
        code, _, err = self.run(capsys, *common, "--output_dir", "p", "--repetition_penalty", "1.2")
        assert code == 2
        assert "Add `--repetition_penalty 1`" in err

    def test_greedy_decoding(self, problems, tiny_model_dir, capsys):
        """A training refuses this temperature. All samples of a problem are equal."""
        common = ("--model", tiny_model_dir, "--dataset", problems, "--num_samples", 2, "--max_completion_length", 8)
        code, out, err = self.run(capsys, *common, "--temperature", "0.0", "--output_dir", "g", "--json")
        assert code == 0, err
        assert json.loads(out)["settings"]["temperature"] == 0
        lines = [json.loads(line) for line in Path("g/samples.jsonl").read_text().splitlines()]
        assert all(line["samples"][0] == line["samples"][1] for line in lines)
        assert len({line["samples"][0]["text"] for line in lines}) > 1

    def test_the_longest_sample(self, problems, tmp_path, capsys):
        """By default as with `evaluate`; with a recipe as in its training."""
        (tmp_path / "recipe.yaml").write_text("teacher_model_name_or_path: scripted\noutput_dir: run\n")
        common = ("--model", "scripted", "--dataset", problems, "--num_samples", 1, "--json")
        for name, options, longest in (
            ("a", (), EvalSettings().max_tokens),
            ("b", ("--max_completion_length", 9), 9),
            ("c", ("--config", "recipe.yaml"), 512),
        ):
            code, out, err = self.run(capsys, *common, "--output_dir", name, *options)
            assert code == 0, err
            assert json.loads(out)["settings"]["max_tokens"] == longest

    def test_the_datasets_of_a_recipe(self, problems, tiny_model_dir, tmp_path, capsys):
        """A mixture, its rows read one by one if the recipe streams, and a set of the command line in its place."""
        recipe = tmp_path / "recipe.yaml"
        common = (
            "--config",
            recipe,
            "--num_samples",
            1,
            "--max_completion_length",
            4,
            "--model",
            "scripted",
            "--json",
        )
        for name, text in (
            ("mixture", f"datasets:\n  - path: {problems}\n    split: train\n"),
            ("stream", f"dataset_name: {problems}\ndataset_streaming: true\nmax_steps: 1\n"),
        ):
            recipe.write_text(text + f"model_name_or_path: {tiny_model_dir}\noutput_dir: run\n")
            code, _, err = self.run(capsys, *common, "--output_dir", name)
            assert code == 2
            assert "has only the split 'train', which the recipe trains on" in err
            code, out, err = self.run(capsys, *common, "--limit", 4, "--output_dir", name, "--split", "train")
            assert code == 0, err
            assert json.loads(out)["metrics"]["num_problems"] == 4
        (tmp_path / "others.jsonl").write_text(json.dumps({"question": "1 + 1 =", "answer": "2"}) + "\n")
        recipe.write_text(f"datasets:\n  - path: {problems}\n    split: train\noutput_dir: run\n")
        code, out, err = self.run(capsys, *common, "--dataset", "others.jsonl", "--output_dir", "other")
        assert code == 0, err
        assert json.loads(out)["metrics"]["num_problems"] == 1
        recipe.write_text(f"dataset_name: benchmark:dapo_math_17k@{problems}\noutput_dir: run\n")
        code, _, err = self.run(capsys, *common, "--output_dir", "set")
        assert code == 2
        assert "add `--split train`" in err

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ((), "add `--output_dir DIR`"),
            (("--output_dir", "o"), "needs --model"),
            (("--output_dir", "o", "--model", "scripted"), "needs --dataset"),
            (("--output_dir", "o", "--model", "./none", "--dataset", "problems.jsonl"), "no model folder './none'"),
            (("--output_dir", "o", "--temprature", "1"), "Did you mean `temperature`"),
            (("out",), "`out` belongs to no option"),
            (("--compare", "a", "b"), "holds no result"),
            (("--compare", "a", "b", "--josn"), "Did you mean `json`"),
            (("--compare", "a", "b", "--learning_rate", "1"), "--learning_rate has no effect"),
            (("--compare", "a", "b", "--output_dir", "o"), "--output_dir has no effect"),
            (
                ("--output_dir", "o", "--model", "scripted", "--dataset", "problems.jsonl", "--eval_seed", 2**31),
                "seed=",
            ),
        ],
    )
    def test_what_is_missing_is_one_line(self, problems, options, words, capsys):
        code, _, err = self.run(capsys, *options)
        assert code != 0
        assert words in err
        assert err.count("\n") == 1
