# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The demo's world and the models that ship with the package."""

import random
import re
from itertools import islice

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from omniopd_trl.demo import ASSETS, asset_path
from omniopd_trl.demo.build import RECIPES, make_problem_sets, make_tokenizer, pass_rate, render_prompt, write
from omniopd_trl.demo.world import NO_SLIP, STUDENT_SLIP, STYLES, Slip, mixed_solution, problems, solution
from tests.support import ROOT

MODELS = ("student", "teacher", "teacher_shared", "teacher_varied")
MEGABYTE = 2**20

SIGNS = {"plus": "+", "and": "+", "with": "+", "minus": "-", "less": "-", "without": "-"}
SIGNS |= {"times": "*", "groups of": "*", "lots of": "*"} | {sign: sign for sign in "+-*"}
EQUATION = re.compile(
    rf"(?P<left>-?\d+) (?P<sign>{'|'.join(map(re.escape, SIGNS))}) (?P<right>-?\d+)(?: more)? "
    r"(?:=|makes|leaves|gives|comes to|is) (?P<result>-?\d+)"
)


def some_problems(count, seed="test"):
    return list(islice(problems(seed), count))


def solved_from_the_words(question):
    """The answer, from the question's text alone."""
    first, *events, _ = question.split(". ")
    total = int(re.search(r"\d+", first).group())
    for event in events:
        numbers = [int(number) for number in re.findall(r"\d+", event)]
        amount = numbers[0] * numbers[1] if len(numbers) == 2 else numbers[0]
        total += amount if event.split()[1] in ("finds", "buys", "wins", "makes") else -amount
    return str(total)


def equations(text):
    """Every calculation that a text shows, as (left, operator, right, result)."""
    return [
        (int(match["left"]), SIGNS[match["sign"]], int(match["right"]), int(match["result"]))
        for match in EQUATION.finditer(text)
    ]


def is_exact(left, sign, right, result):
    return result == {"+": left + right, "-": left - right, "*": left * right}[sign]


class TestProblems:
    def test_the_same_seed_gives_the_same_problems(self):
        assert some_problems(200) == some_problems(200)
        assert some_problems(200) != some_problems(200, seed="other")

    def test_answers_follow_from_the_words(self):
        for problem in some_problems(500):
            assert problem.answer == solved_from_the_words(problem.question)
            assert 10 <= int(problem.answer) <= 99

    def test_problems_are_distinct_and_avoid_the_excluded_ones(self):
        first = {problem.question for problem in some_problems(300)}
        assert len(first) == 300
        assert not first & {problem.question for problem in islice(problems("test", exclude=first), 300)}

    def test_problems_take_two_to_four_calculations(self):
        counts = {len(equations(solution(problem, "student"))) for problem in some_problems(500)}
        assert counts == {2, 3, 4}


class TestSolutions:
    @pytest.mark.parametrize("style", STYLES)
    def test_without_slips_every_calculation_and_the_answer_are_right(self, style):
        for seed, problem in enumerate(some_problems(300)):
            text = solution(problem, style, rng=random.Random(seed))
            assert len(equations(text)) == len(equations(solution(problem, "student")))
            assert all(is_exact(*equation) for equation in equations(text))
            assert text.splitlines()[-1] == f"Answer: {problem.answer}"

    def test_styles_differ_in_wording_and_layout(self):
        for problem in some_problems(50):
            student, teacher = (solution(problem, style).splitlines()[:-1] for style in ("student", "teacher"))
            assert not set(student) & set(teacher)
            assert all(line.startswith(problem.name) for line in student)
            assert all(line.startswith("- ") for line in teacher[1:])

    def test_varied_wording_is_random_and_never_the_students(self):
        rng = random.Random(0)
        for problem in some_problems(50):
            texts = [solution(problem, "varied", rng=rng) for _ in range(4)]
            assert len(set(texts)) == 4
            for text in texts:
                assert not re.search(r"=|[-+*] \d|, so\b|\bhas\b|starts with|:(?! \d+$)", text)

    def test_wording_is_fixed_by_the_problem(self):
        """What varies between two writers of one style is numbers alone."""
        for problem in some_problems(100):
            slipped = solution(problem, "student", Slip(1.0, 1.0, 1.0), random.Random(0))
            assert re.sub(r"-?\d+", "#", slipped) == re.sub(r"-?\d+", "#", solution(problem, "student"))

    def test_slips_are_the_documented_ones_and_are_carried_forward(self):
        rng = random.Random(0)
        wrong = 0
        for problem in some_problems(300):
            text = solution(problem, "student", STUDENT_SLIP, rng)
            for left, sign, right, result in equations(text):
                if is_exact(left, sign, right, result):
                    continue
                wrong += 1
                if sign == "+":
                    assert left % 10 + right % 10 >= 10
                    assert result == left + right - 10
                elif sign == "-":
                    assert left % 10 < right % 10
                    assert result == left - right + 10
                else:
                    assert result in (left * right - right, left * right + right)
            totals = [problem.start] + [result for _, sign, _, result in equations(text) if sign != "*"]
            lefts = [left for left, sign, _, _ in equations(text) if sign != "*"]
            assert lefts == totals[:-1]
            assert text.splitlines()[-1] == f"Answer: {totals[-1]}"
        assert wrong > 100

    def test_slips_need_a_source_of_randomness(self):
        problem = some_problems(1)[0]
        with pytest.raises(ValueError, match="rng="):
            solution(problem, "student", STUDENT_SLIP)
        with pytest.raises(ValueError, match="rng="):
            mixed_solution(problem, 0.5, slip=STUDENT_SLIP)
        with pytest.raises(ValueError, match="rng="):
            solution(problem, "varied")
        with pytest.raises(ValueError, match="rng="):
            mixed_solution(problem, 0.5, "student", "varied")


class TestMixedSolutions:
    def test_the_ends_are_the_two_pure_styles(self):
        for problem in some_problems(50):
            whole = solution(problem, "student")
            assert mixed_solution(problem, 0) == ("", solution(problem, "teacher"))
            assert mixed_solution(problem, 1.0) == (whole, "")
            assert mixed_solution(problem, len(whole)) == (whole, "")
            assert mixed_solution(problem, 0, "teacher", "student") == ("", whole)

    @pytest.mark.parametrize("then", ["teacher", "varied"])
    def test_every_cut_keeps_what_is_written_and_continues_correctly(self, then):
        """A slow, obvious check: read the equations back, and compare each with where it stands."""
        for seed, problem in enumerate(some_problems(40)):
            rng = random.Random(seed)
            if then == "varied":
                rng.getrandbits(64)  # the seed of the words is drawn before the slips
            draft = solution(problem, "student", STUDENT_SLIP, rng)
            for cut in range(len(draft) + 1):
                before, after = mixed_solution(problem, cut, then=then, slip=STUDENT_SLIP, rng=random.Random(seed))
                assert before == draft[:cut]
                text = before + after
                for match in EQUATION.finditer(text):
                    if match.start("result") >= cut:
                        assert is_exact(*equations(match.group())[0])
                totals = [problem.start] + [result for _, sign, _, result in equations(text) if sign != "*"]
                assert text.splitlines()[-1] == f"Answer: {totals[-1]}"

    def test_a_begun_line_ends_in_its_own_style_and_the_next_is_in_the_other(self):
        problem = some_problems(1)[0]
        draft = solution(problem, "student")
        first_line = draft.index("\n") + 1
        before, after = mixed_solution(problem, first_line + 3)
        begun, *rest = (before + after)[first_line:].splitlines()
        assert begun == draft.splitlines()[1]
        assert all(line.startswith("- ") for line in rest[:-1])

    def test_a_varied_text_takes_over_after_the_begun_part_of_a_line(self):
        problem = some_problems(1)[0]
        draft = solution(problem, "student")
        result = re.search(r"= \d+", draft)
        for cut in (result.end() - 1, result.end()):
            before, after = mixed_solution(problem, cut, "student", "varied", rng=random.Random(0))
            assert before == draft[:cut]
            assert (before + after).startswith(draft[: result.end()])
            assert ", so" not in before[result.start() :] + after

    def test_a_cut_outside_the_solution_is_refused(self):
        problem = some_problems(1)[0]
        with pytest.raises(ValueError, match="cut=100000"):
            mixed_solution(problem, 100000)


class TestAssets:
    def test_unknown_asset_is_refused(self):
        with pytest.raises(ValueError, match="'studnet'"):
            asset_path("studnet")

    @pytest.mark.parametrize("name", ASSETS)
    def test_assets_are_there(self, name):
        assert asset_path(name).is_dir()

    def test_assets_are_small(self):
        sizes = [path.stat().st_size for path in asset_path("student").parent.rglob("*") if path.is_file()]
        assert sum(sizes) < 12 * MEGABYTE
        assert max(sizes) < 5 * MEGABYTE

    def test_problem_sets_are_the_ones_that_the_world_makes(self):
        datasets = pytest.importorskip("datasets")
        for name, members in make_problem_sets().items():
            rows = datasets.Dataset.from_json(str(asset_path("problems") / f"{name}.jsonl"))
            assert rows.column_names == ["question", "answer"]
            assert list(rows["question"]) == [problem.question for problem in members]
            assert [str(answer) for answer in rows["answer"]] == [problem.answer for problem in members]
        train, test = make_problem_sets().values()
        assert not {problem.question for problem in train} & {problem.question for problem in test}

    @pytest.mark.parametrize("name", MODELS)
    def test_models_load_and_are_qwen3(self, name):
        model = AutoModelForCausalLM.from_pretrained(asset_path(name))
        tokenizer = AutoTokenizer.from_pretrained(asset_path(name))
        assert model.config.model_type == "qwen3"
        assert model.config.vocab_size == len(tokenizer)
        assert model.config.eos_token_id == tokenizer.eos_token_id != tokenizer.pad_token_id
        assert tokenizer.model_max_length == model.config.max_position_embeddings == 1024

    def test_the_teacher_has_a_tokenizer_of_its_own_and_the_other_teacher_has_the_students(self):
        student, teacher, shared, _ = (AutoTokenizer.from_pretrained(asset_path(name)) for name in MODELS)
        assert student.get_vocab() == shared.get_vocab()
        assert student.get_vocab() != teacher.get_vocab()
        text = solution(some_problems(1)[0], "student")
        assert student(text)["input_ids"] == shared(text)["input_ids"]
        assert len(student(text)["input_ids"]) != len(teacher(text)["input_ids"])

    @pytest.mark.parametrize("name", ["student", "teacher", "teacher_varied"])
    def test_tokenizers_can_be_rebuilt(self, name):
        rebuilt = make_tokenizer(RECIPES[name].tokenizer)
        assert rebuilt.get_vocab() == AutoTokenizer.from_pretrained(asset_path(name)).get_vocab()

    @pytest.mark.parametrize("name", ["student", "teacher", "teacher_varied"])
    def test_digits_are_single_tokens_and_text_survives(self, name):
        tokenizer = AutoTokenizer.from_pretrained(asset_path(name))
        for digit in "0123456789":
            assert len(tokenizer(digit)["input_ids"]) == 1
        text = "Grüße, 12345 – Mia has 7 apples.\n\n  Answer: 42"
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
        assert sum(token in "0123456789" for token in tokenizer.convert_ids_to_tokens(ids)) == 8

    def test_chat_template_continues_a_begun_answer(self):
        tokenizer = AutoTokenizer.from_pretrained(asset_path("teacher"))
        messages = [{"role": "user", "content": "How many?"}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert prompt == "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n"
        begun = [*messages, {"role": "assistant", "content": "There are "}]
        assert (
            tokenizer.apply_chat_template(begun, tokenize=False, continue_final_message=True) == prompt + "There are "
        )

    def test_no_path_of_the_machine_that_built_them(self):
        package = ROOT
        forbidden = re.compile(
            rf"/(?:home|root|tmp|work|usr|opt|mnt)/|_name_or_path|{re.escape(str(package))}".encode()
        )
        for path in asset_path("student").parent.rglob("*"):
            if path.is_file():
                assert not forbidden.search(path.read_bytes()), path


class TestModels:
    """A small sample; docs/demo.md has the numbers for the whole test set."""

    @pytest.fixture(scope="class")
    def texts(self):
        sample = make_problem_sets()["test"][:64]
        written = {}
        for name in MODELS:
            model = AutoModelForCausalLM.from_pretrained(asset_path(name), dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(asset_path(name))
            torch.manual_seed(0)
            prompts = [render_prompt(tokenizer, problem.question) for problem in sample]
            begun = [mixed_solution(problem, 0.5, slip=STUDENT_SLIP, rng=random.Random(0)) for problem in sample]
            written[name] = (
                write(model, tokenizer, prompts),
                write(model, tokenizer, [prompt + text for prompt, (text, _) in zip(prompts, begun, strict=True)]),
            )
        return sample, begun, written

    def test_the_teachers_are_much_better_than_the_student(self, texts):
        sample, _, written = texts
        answers = [problem.answer for problem in sample]
        rates = {name: pass_rate(alone, answers) for name, (alone, _) in written.items()}
        assert 0.15 < rates["student"] < 0.55
        assert min(rates["teacher"], rates["teacher_shared"], rates["teacher_varied"]) > 0.85

    def test_the_student_is_well_formed_but_wrong(self, texts):
        sample, _, written = texts
        shapes = [
            re.sub(r"-?\d+", "#", text) == re.sub(r"-?\d+", "#", solution(problem, "student", NO_SLIP))
            for problem, text in zip(sample, written["student"][0], strict=True)
        ]
        assert sum(shapes) / len(shapes) > 0.9

    def test_the_teachers_write_their_own_style(self, texts):
        _, _, written = texts
        for name in ("teacher", "teacher_shared"):
            assert sum(text.startswith("Let us count the ") for text in written[name][0]) > 60

    def test_the_varied_teacher_writes_foreign_words_that_differ_in_every_text(self, texts):
        alone, _ = texts[2]["teacher_varied"]
        foreign = [not re.search(r"=|, so|\bhas\b|starts with", text) for text in alone]
        assert sum(foreign) / len(foreign) > 0.95
        openings = {re.sub(r"\d+.*", "", text.partition("\n")[0]) for text in alone}
        assert len(openings) >= 4

    def test_the_teachers_go_on_from_what_a_student_wrote(self, texts):
        _, begun, written = texts
        for name in ("teacher", "teacher_shared"):
            right = [text == rest for text, (_, rest) in zip(written[name][1], begun, strict=True)]
            assert sum(right) / len(right) > 0.8
        pairs = zip(written["teacher_varied"][1], begun, strict=True)
        right = [text.rpartition("\n")[2] == rest.rpartition("\n")[2] for text, (_, rest) in pairs]
        assert sum(right) / len(right) > 0.75  # and every result on the way


@pytest.mark.slow
class TestTheDemoTeaches:
    """The recipe of `make demo` and the one in the paper's form, beside the same runs with shuffled weights."""

    @staticmethod
    def run(recipe, seed, shuffled, folder):
        from omniopd_trl.cli import train
        from omniopd_trl.cli.recipe import parse_args
        from omniopd_trl.trainer import omniopd_trainer

        assert omniopd_trainer.OmniOPDTrainer.__module__ == "omniopd_trl.trainer.omniopd_trainer", (
            "a run left its patch behind"
        )

        trainers = []

        class Watched(omniopd_trainer.OmniOPDTrainer):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                trainers.append(self)

        options = ["--seed", str(seed), "--output_dir", str(folder), "--evaluate_teacher", "false"]
        if shuffled:
            options += ["--posterior_baseline", "shuffled"]
        # Undone after each run: the class of the next run derives from the real trainer, not from this one.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(omniopd_trainer, "OmniOPDTrainer", Watched)
            train.main(*parse_args(["--config", str(ROOT / "recipes" / recipe), *options]))
        scores = [entry["eval_pass@1"] for entry in trainers[0].state.log_history if "eval_pass@1" in entry]
        what = f"{recipe}, seed {seed}{', shuffled' if shuffled else ''}"
        print(f"{what}: {scores[0]:.3f} -> {scores[-1]:.3f}")  # noqa: T201
        return scores[0], scores[-1]

    @pytest.mark.timeout(3600)
    @pytest.mark.parametrize(
        ("recipe", "seed"),
        [
            ("demo.yaml", 0),
            pytest.param("demo.yaml", 1, marks=pytest.mark.exhaustive),
            pytest.param("demo_paper.yaml", 0, marks=pytest.mark.exhaustive),
        ],
    )
    def test_a_seed_improves_and_its_control_does_not(self, recipe, seed, tmp_path):
        before, after = self.run(recipe, seed, False, tmp_path / "recipe")
        _, control = self.run(recipe, seed, True, tmp_path / "control")
        assert after > before + 0.25
        assert after > control + 0.25
