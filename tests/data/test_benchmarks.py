# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Named sets: small files with the columns that each has on the Hub become prompts, answers and tests."""

import json

import pytest
from datasets import Dataset
from trl import DatasetMixtureConfig

from omniopd_trl.cli.eval import load_problems
from omniopd_trl.cli.recipe import OmniOPDScriptArguments, load_splits
from omniopd_trl.data import BENCHMARKS, load_benchmark, prepare_prompts
from omniopd_trl.data.benchmarks import load_benchmark_splits
from omniopd_trl.data.checks import check_dataset
from omniopd_trl.errors import ConfigError, DataError
from scripts import datasets_table
from scripts.pages import page_with

STDIN = {"inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7\n"]}
CALL = {"fn_name": "add", "inputs": [[1, 2]], "outputs": [3]}


def dapo(index, answer="34"):
    return {
        "data_source": "math_dapo",
        "prompt": [{"content": f"Solve {index}.", "role": "user"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": index},
    }


def eurus(ability, source, truth, question="Add two numbers."):
    return {
        "data_source": source,
        "prompt": [
            {"content": "\nWhen tackling complex reasoning tasks, you have access to actions.\n", "role": "system"},
            {"content": question, "role": "user"},
        ],
        "ability": ability,
        "reward_model": {"ground_truth": truth, "style": "rule"},
        "extra_info": {"index": 0, "split": "dummy"},
    }


OLYMPIAD = {
    "id": 1606,
    "question": "Find $x$.",
    "solution": ["..."],
    "final_answer": ["$2$"],
    "context": None,
    "image_1": None,
    "modality": "Text-only",
    "difficulty": "Competition",
    "is_multiple_answer": False,
    "unit": None,
    "answer_type": "Numerical",
    "error": None,
    "question_type": "Open-ended",
    "subfield": "Algebra",
    "subject": "Math",
    "language": "English",
}
APPS = {
    "problem_id": 7,
    "question": "Add two numbers.\n",
    "solutions": json.dumps(["print(sum(map(int, input().split())))"]),
    "input_output": json.dumps(STDIN),
    "difficulty": "interview",
    "url": "https://example.org/7",
    "starter_code": "",
}
# Python refuses to read the number, and reads the text.
LONG_NUMBER = {**APPS, "input_output": '{"fn_name": "f", "inputs": [[1]], "outputs": [%s]}' % ("1" * 4301)}
LONG_TEXT = {**APPS, "input_output": json.dumps({"inputs": ["1" * 5000], "outputs": ["1"]})}
EURUS = [
    eurus("math", "numina_olympiads", "\\frac{1}{2}"),
    eurus("code", "apps", json.dumps(STDIN)),
    eurus("code", "taco", json.dumps(CALL)),
    eurus("code", "codecontests", json.dumps(STDIN)),
    eurus("code", "codecontests", LONG_NUMBER["input_output"]),
    eurus("code", "codeforces", json.dumps(STDIN)),
]

TACO = {**APPS, "name": None, "source": "leetcode", "tags": "[]", "skill_types": "[]"}
del TACO["problem_id"]
CONTEST = {
    "name": "1_A. Sum",
    "description": "Add two numbers.",
    "public_tests": {"input": ["1 2\n"], "output": ["3\n"]},
    "private_tests": {"input": ["3 4\n"], "output": ["7\n"]},
    "generated_tests": {"input": [], "output": []},
    "source": 2,
    "difficulty": 7,
    "solutions": {"language": [3], "solution": ["print(sum(map(int, input().split())))"]},
    "input_file": "",
    "output_file": "",
}
CODEFORCES = {
    "id": "1/A",
    "title": "Sum",
    "description": "Add two numbers.",
    "input_format": "Two numbers.",
    "output_format": "Their sum.",
    "interaction_format": None,
    "note": "None.",
    "examples": [{"input": "1 2", "output": "3"}],
    "official_tests": [{"input": "1 2\n", "output": "3\n"}, {"input": "3 4\n", "output": "7\n"}],
    "official_tests_complete": True,
    "input_mode": "stdio",
    "generated_checker": None,
}
HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": 'def add(a, b):\n    """Add."""\n',
    "canonical_solution": "    return a + b\n",
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
    "entry_point": "add",
}

# For each set: the rows of a file, those that belong to it, and the answer or the tests of the first.
LAYOUTS = {
    "dapo_math_17k": ([{"prompt": "1 + 1?", "solution": "2", "ability": "math"}], [0], "2"),
    "dapo_math_17k_original": ([dapo("a"), dapo("b"), dapo("a"), dapo("b"), dapo("c")], [0, 1, 4], "34"),
    "eurus_math": (EURUS, [0], "\\frac{1}{2}"),
    "eurus_code": (EURUS, [1, 2, 3, 5], STDIN),
    "eurus_apps_100": (EURUS, [1], STDIN),
    "eurus_taco_100": (EURUS, [2], CALL),
    "eurus_codecontests_100": (EURUS, [3], STDIN),
    "eurus_codeforces_100": (EURUS, [5], STDIN),
    "aime_2024": (
        [{"id": 60, "problem": "P?", "solution": "...", "answer": "204", "url": "", "year": "2024"}],
        [0],
        "204",
    ),
    "aime_2025": ([{"problem": "P?", "answer": "70", "id": "0"}], [0], "70"),
    "amc_2023": ([{"id": 0, "question": "P?", "answer": 27.0, "url": ""}], [0], "27.0"),
    "math_500": (
        [
            {
                "problem": "P?",
                "solution": "...",
                "answer": "\\frac{1}{2}",
                "subject": "Algebra",
                "unique_id": "test/1.json",
            }
        ],
        [0],
        "\\frac{1}{2}",
    ),
    "olympiad_bench": (
        [
            OLYMPIAD,
            {**OLYMPIAD, "language": "Chinese"},
            {**OLYMPIAD, "modality": "Multimodal"},
            {**OLYMPIAD, "question_type": "Theorem proof"},
            {**OLYMPIAD, "error": "wrong"},
        ],
        [0],
        "$2$",
    ),
    "apps": ([{**APPS, "input_output": ""}, APPS, LONG_NUMBER, LONG_TEXT], [1, 3], STDIN),
    "code_contests": ([CONTEST, {**CONTEST, "input_file": "input.txt"}], [0], STDIN),
    "taco": ([TACO, {**TACO, "input_output": json.dumps({"inputs": [], "outputs": []})}], [0], STDIN),
    "codeforces": (
        [
            CODEFORCES,
            {**CODEFORCES, "official_tests_complete": False},
            {**CODEFORCES, "generated_checker": "import sys"},
            {**CODEFORCES, "interaction_format": "Ask."},
            {**CODEFORCES, "input_mode": "file"},
        ],
        [0],
        STDIN,
    ),
    "humaneval": ([HUMANEVAL], [0], {"check": HUMANEVAL["test"], "entry_point": "add"}),
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """What `datasets` prepares from local files stays in the test's folder."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def write(tmp_path):
    """A function that writes rows to a file, as JSON lines unless its name ends in `.parquet`."""

    def write(name, rows):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            Dataset.from_list(rows).to_parquet(path)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.mark.parametrize("name", BENCHMARKS)
def test_layout(name, write):
    """Each set reads a file with the columns of the Hub: prompts that a trainer takes, and what is scored against."""
    rows, kept, expected = LAYOUTS[name]
    dataset = load_benchmark(f"{name}@{write('set.parquet', rows)}")
    check_dataset(dataset)
    assert len(dataset) == len(kept)
    problem = dataset[0]
    assert problem["source"] == name
    assert problem["id"]
    scored = "tests" if BENCHMARKS[name].scorer == "code" else "answer"
    assert set(problem) == {"prompt", "question", "id", "source", scored}
    assert (json.loads(problem["tests"]) if scored == "tests" else problem["answer"]) == expected
    assert [message["role"] for message in problem["prompt"]] == ["user"]
    assert problem["question"] in problem["prompt"][0]["content"]


def test_documented():
    """The page lists every set as the table of the code has it: source, license, and what is left out."""
    part = datasets_table.render()
    text = datasets_table.PAGE.read_text(encoding="utf-8")
    assert page_with(text, datasets_table.BEGIN, datasets_table.END, part) == text, "Run `make docs`."
    for name, benchmark in BENCHMARKS.items():
        (row,) = [line for line in part.splitlines() if line.startswith(f"| `{name}` |")]
        assert benchmark.license in row
        assert benchmark.source in row


@pytest.mark.parametrize("name", ["dapo_math_17k_original", "codeforces", "apps"])
def test_which_rows(name, write):
    """The rows that stay are those of the set, in their order."""
    rows, kept, _ = LAYOUTS[name]
    marked = [
        {**row, "prompt": [{"role": "user", "content": f"Solve row {i}."}]}
        if name.startswith("dapo")
        else {**row, "description": f"Solve row {i}.", "question": f"Solve row {i}."}
        for i, row in enumerate(rows)
    ]
    dataset = load_benchmark(f"{name}@{write('set.jsonl', marked)}")
    assert [question.partition("\n")[0] for question in dataset["question"]] == [f"Solve row {i}." for i in kept]


def test_prompts(write):
    """Mathematics is asked as in the paper's Table 7; code says how the program is read, and with what it starts."""
    (prompt,) = load_benchmark(f"aime_2025@{write('a.jsonl', LAYOUTS['aime_2025'][0])}")["prompt"]
    assert prompt[0]["content"].startswith("Solve the following math problem step by step. The last line")
    assert prompt[0]["content"].endswith("\n\nP?")
    function = {**APPS, "starter_code": "def add(a, b):", "input_output": json.dumps(CALL)}
    first, second = load_benchmark(f"apps@{write('b.jsonl', [APPS, function])}")["prompt"]
    assert "Read the input from standard input" in first[0]["content"]
    assert "Write the function `add`." in second[0]["content"]
    assert second[0]["content"].endswith("```python\ndef add(a, b):\n```")


def test_folder_and_split(write, tmp_path):
    """A folder has splits by its file names: the table's by default, or the one that is asked for."""
    write("math/test.jsonl", LAYOUTS["math_500"][0])
    write("math/train.jsonl", [{**LAYOUTS["math_500"][0][0], "answer": "5"}])
    assert load_benchmark(f"math_500@{tmp_path / 'math'}")["answer"] == ["\\frac{1}{2}"]
    assert load_benchmark(f"math_500@{tmp_path / 'math'}", split="train")["answer"] == ["5"]
    with pytest.raises(DataError, match=r"no split 'dev' \(it has: 'train', 'test'\)"):
        load_benchmark(f"math_500@{tmp_path / 'math'}", split="dev")


@pytest.mark.parametrize(
    ("name", "folders", "of_the_set"),
    [
        ("dapo_math_17k", ["all", "cn", "en"], "en"),
        ("olympiad_bench", ["OlympiadBench/OE_MM_maths_en_COMP", "OlympiadBench/OE_TO_maths_en_COMP"], "OE_TO"),
        ("taco", ["ALL", "EASY"], "ALL"),
    ],
)
def test_copy_of_a_repository(name, folders, of_the_set, write, tmp_path):
    """Of a copy of the whole repository, the configuration of the set is read, and no other."""
    row = LAYOUTS[name][0][0]
    asked = "prompt" if name == "dapo_math_17k" else "question"
    for folder in folders:
        write(f"copy/{folder}/{BENCHMARKS[name].split}.jsonl", [{**row, asked: f"In {folder}?"}])
    (question,) = load_benchmark(f"{name}@{tmp_path / 'copy'}")["question"]
    assert of_the_set in question


def test_limit(write):
    """A limit takes the first problems, in order, of those that belong to the set."""
    rows = [{"problem": f"{i} + 1?", "answer": str(i + 1), "id": str(i)} for i in range(5)]
    path = write("aime.jsonl", rows)
    assert load_benchmark(f"aime_2025@{path}", limit=3)["id"] == ["0", "1", "2"]
    assert len(load_benchmark(f"aime_2025@{path}", limit=9)) == 5
    with pytest.raises(ConfigError, match="limit=0"):
        load_benchmark(f"aime_2025@{path}", limit=0)


def test_one_hundred(write):
    """Of a category of the validation split, the same 100 problems are drawn every time, without repetition."""
    rows = [eurus("code", "apps" if i % 2 else "taco", json.dumps(STDIN), f"Problem {i}.") for i in range(300)]
    path = write("validation.parquet", rows)
    drawn = load_benchmark(f"eurus_apps_100@{path}")["question"]
    assert drawn == load_benchmark(f"eurus_apps_100@{path}")["question"]
    assert len(set(drawn)) == 100
    assert all(int(question.strip("Problem.")) % 2 for question in drawn)
    assert drawn != sorted(drawn, key=lambda question: int(question.strip("Problem.")))


def test_same_prompts_same_fingerprint(write):
    """A run is resumed by the fingerprint of its prompts: the same files give the same one, other files another."""
    math, own = (write(name, LAYOUTS["aime_2025"][0]) for name in ("aime.jsonl", "own.jsonl"))
    code = write("code.parquet", EURUS)
    other = write("other.jsonl", [{"problem": "Q", "answer": "1", "id": "2"}])
    for name in (
        f"aime_2025@{math}",
        str(own),
        f"eurus_apps_100@{code}",
        f"aime_2025@{math},aime_2025@{other}",
        "reasoning_gym:chain_sum?size=3",
    ):
        first, again = (load_benchmark_splits(name)["test"]._fingerprint for _ in range(2))
        assert first == again, name
    first, second = (load_benchmark(f"aime_2025@{path}")._fingerprint for path in (math, other))
    assert first != second


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        (
            "math_500",
            [{"question": "P?", "answer": "1"}],
            r"The set 'math_500' has no column 'problem' \(it has: ques",
        ),
        ("aime_2025", [{"problem": "P?", "answer": "", "id": "0"}], r"Row 0 of the set 'aime_2025' .* no answer"),
        ("apps", [{**APPS, "input_output": "{'inputs'"}], r"Row 0 of the set 'apps' cannot be read \(JSONDecodeError"),
        ("apps", [{**APPS, "input_output": '{"inputs": ["1"], "outputs": []}'}], "1 inputs and 0 outputs"),
        ("eurus_taco_100", EURUS[:2], r"no problems left. Left out are: other categories than taco"),
        ("eurus_code", [eurus("code", "apps", "4")], r"Row 0 of the set 'eurus_code'.*reward_model"),
        ("apps", [{**APPS, "input_output": STDIN}], "Row 0 of the set 'apps' .* tests are a dict, and no JSON"),
        ("eurus_code", [{**EURUS[1], "reward_model": {"style": "rule"}}], "Row 0 .*KeyError: 'ground_truth'"),
        ("dapo_math_17k_original", [dapo("a"), {**dapo("b"), "extra_info": None}], "Row 1 of the set .*TypeError"),
        ("dapo_math_17k_original", [dapo("a"), dapo(None)], "Row 1 of the set .* no extra_info.index"),
        ("aime_2025", [{"problem": "P?", "answer": None, "id": "0"}], "Row 0 of the set 'aime_2025' .* no answer"),
        ("dapo_math_17k_original", [dapo("a", None)], "Row 0 of the set .* no answer"),
        ("eurus_math", [eurus("math", "numina_olympiads", None)], "Row 0 of the set 'eurus_math' .* no answer"),
        ("olympiad_bench", [{**OLYMPIAD, "final_answer": "42"}], "final_answer is '42' and no list"),
    ],
)
def test_unreadable(name, rows, message, write):
    """Data that cannot be read are an error that names the set and its columns."""
    with pytest.raises(DataError, match=message):
        load_benchmark(f"{name}@{write('set.jsonl', rows)}")


def test_own_file(write):
    """A custom file needs a question and what it is scored against. Its other columns are kept."""
    (problem,) = load_benchmark(str(write("own.jsonl", [{"question": "1 + 1?", "answer": "2", "level": 3}])))
    assert problem["prompt"][0]["content"].endswith("\n\n1 + 1?")
    assert (problem["answer"], problem["level"], problem["id"]) == ("2", 3, "0")
    (asked,) = load_benchmark(str(write("prompt.jsonl", [{"prompt": "1 + 1?", "solution": "2", "id": "a"}])))
    assert (asked["prompt"], asked["id"]) == ("1 + 1?", "a")
    (code,) = load_benchmark(str(write("code.jsonl", [{"problem": "Add.", "tests": json.dumps(STDIN)}])))
    assert "```python" in code["prompt"][0]["content"]
    with pytest.raises(DataError, match="no column 'answer', 'solution' or 'tests'"):
        load_benchmark(str(write("a.jsonl", [{"question": "1 + 1?"}])))
    with pytest.raises(DataError, match="no column 'prompt', 'question' or 'problem'"):
        load_benchmark(str(write("b.jsonl", [{"text": "1 + 1?", "answer": "2"}])))


def test_unknown_names():
    """A mistyped name gets a suggestion, and is not looked up on the Hub."""
    with pytest.raises(ConfigError, match=r"no set 'math500'\. Did you mean `math_500`"):
        load_benchmark("math500")
    with pytest.raises(ConfigError, match=r"no set 'math500'\. Did you mean `math_500`"):
        load_benchmark("math500@/data/MATH-500.jsonl")
    with pytest.raises(ConfigError, match="'math_500@' names no path"):
        load_benchmark("math_500@")
    with pytest.raises(ConfigError, match="There are dapo_math_17k, "):
        load_benchmark("xyz")


class TestReasoningGym:
    """`reasoning_gym:TASK`."""

    def test_the_template_of_a_recipe(self):
        """It replaces the prompt of the set, in training and in `omniopd eval`."""
        name, template = "reasoning_gym:chain_sum?min_terms=2&max_terms=2&max_digits=1&size=3", "{question} So"
        arguments = OmniOPDScriptArguments(dataset_name=name, prompt_template=template)
        mixture = DatasetMixtureConfig()
        test = prepare_prompts(load_splits(arguments, mixture), template)["test"]
        assert [row["prompt"][0]["content"] for row in test] == [f"{row['question']} So" for row in test]
        assert list(test["prompt"]) == list(load_problems(arguments, mixture, "test")["prompt"])
        plain = load_problems(OmniOPDScriptArguments(dataset_name=name), mixture)
        assert "Answer: " in plain[0]["prompt"][0]["content"]

    def test_problems(self):
        """Options reach the task; the same name gives the same problems, another seed others."""
        name = "reasoning_gym:chain_sum?min_terms=2&max_terms=2&max_digits=1&size=20&seed=7"
        dataset = load_benchmark(name)
        check_dataset(dataset)
        for problem in dataset:
            expression = problem["question"].rpartition(": ")[2].rstrip(" =")
            assert problem["answer"] == str(eval(expression))
            assert problem["prompt"][0]["content"].startswith(problem["question"])
        assert dataset["question"] == load_benchmark(name)["question"]
        assert dataset["question"] != load_benchmark(name.replace("seed=7", "seed=8"))["question"]
        assert load_benchmark(name, limit=3)["id"] == ["test-0", "test-1", "test-2"]

    def test_options_that_are_lists(self):
        """Commas in brackets and plus signs belong to an option; sets may have spaces between them."""
        sums = 'reasoning_gym:basic_arithmetic?operators=["+","-"]&size=4'
        questions = load_benchmark_splits(f"{sums}, reasoning_gym:gcd?size=2")["test"]["question"]
        assert questions[:4] == load_benchmark(sums)["question"]
        assert len(questions) == 6
        assert "+" in questions[0]

    def test_splits_are_apart(self):
        """No test problem is a training problem, though one-digit sums repeat."""
        name = "reasoning_gym:chain_sum?min_terms=2&max_terms=2&max_digits=1&size=150"
        train, test = (load_benchmark(name, split)["question"] for split in ("train", "test"))
        assert len(set(train)) == len(train) > 10
        assert not {*train} & {*test}

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("reasoning_gym:chain_sums", "no task 'chain_sums'. Did you mean `chain_sum`"),
            ("reasoning_gym:chain_sum?terms=2", "unexpected keyword argument 'terms'"),
            ("reasoning_gym:chain_sum?min_terms=-1", "cannot create 'chain_sum' with {'min_terms': -1"),
            ("reasoning_gym:chain_sum?seed=abc", "seed='abc' must be a whole number"),
            ("reasoning_gym:chain_sum?size=2.5", "size=2.5 must be a whole number"),
            ("reasoning_gym:chain_sum?min_terms", "Options of a task are"),
            ("reasoning_gym:chain_sum?min_terms=", "'min_terms' has no value"),
            ("reasoning_gym:chain_sum?size=3&size=4", "'size' has two values"),
            ("reasoning_gym:chain_sum?max_digits=99999", "cannot create 'chain_sum'"),
        ],
    )
    def test_mistakes(self, name, message):
        """Tasks and options that do not exist are errors of one line."""
        with pytest.raises(ConfigError) as error:
            load_benchmark(name)
        assert message in str(error.value)
        assert "\n" not in str(error.value)


class TestInRecipes:
    """What `dataset_name: benchmark:...` loads."""

    def test_training_and_evaluation(self, write):
        """Sets to train on become the split `train`, sets to evaluate on the split `test`, joined in order."""
        train = write("dapo.jsonl", LAYOUTS["dapo_math_17k"][0])
        first, second = (write(f"{name}.jsonl", LAYOUTS[name][0]) for name in ("aime_2024", "aime_2025"))
        name = f"benchmark:dapo_math_17k@{train},aime_2024@{first},aime_2025@{second}"
        splits = load_benchmark_splits(name)
        assert splits["train"]["answer"] == ["2"]
        assert splits["test"]["source"] == ["aime_2024", "aime_2025"]

    def test_procedural(self):
        """A procedural task gives both splits."""
        splits = load_benchmark_splits("reasoning_gym:chain_sum?size=10")
        assert {split: len(dataset) for split, dataset in splits.items()} == {"train": 10, "test": 10}

    def test_joined_sets_have_ids_of_their_own(self):
        """Two tasks number their problems alike, and may have equal answers: an evaluation must tell them apart."""
        test = load_benchmark_splits("reasoning_gym:gcd?size=30,reasoning_gym:lcm?size=30")["test"]
        assert len({*test["id"]}) == len(test) > 30
        assert test["id"][0] == "reasoning_gym:gcd?size=30/test-0"

    def test_kinds_that_do_not_mix(self, write):
        """Problems with answers and problems with tests are not joined."""
        math, code = write("math.jsonl", LAYOUTS["aime_2025"][0]), write("code.jsonl", [HUMANEVAL])
        with pytest.raises(DataError, match=r"\('answer', .* and \('id', .*, and cannot be joined"):
            load_benchmark_splits(f"benchmark:aime_2025@{math},humaneval@{code}")
