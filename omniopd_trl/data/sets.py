# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The table of named sets: where each comes from, its license, its columns, and what is left out.

A set of problems with a text and an answer is one entry of `BENCHMARKS`. Any other layout also needs a function that
reads a row.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import not_
from typing import Any, Literal

Row = dict[str, Any]
Scorer = Literal["math", "code", "reasoning_gym"]

STDIN = "Read the input from standard input and write the output to standard output."

# Python's limit for the conversion of text to a whole number.
_LONG_NUMBER = re.compile(r"\d{4301}")


@dataclass(frozen=True)
class Benchmark:
    """One set of the table.

    Attributes:
        source: id on the Hub.
        split: the split that is loaded by default.
        purpose: whether it is a set to train on or to evaluate on.
        scorer: what scores its answers: `math` reads `answer`, `code` reads `tests`.
        license: license that the source states.
        question: column of the problem's text.
        answer: column of the right answer.
        row: function of a row that returns `question` or `prompt`, and `answer` or `tests`. `None` reads the columns
            `question` and `answer`.
        reads: columns that `row` reads.
        id: column that names a problem. `None` for its number.
        config: configuration on the Hub.
        revision: branch on the Hub.
        folder: folder in the repository.
        keep: the rows that are part of the set: a condition, or the only value, of each column named. The other rows
            are left out.
        left_out: what `keep` and `unique` leave out, in words.
        sample: number of problems that are drawn with a fixed seed. `None` for all.
        unique: `"COLUMN.KEY"` whose repetitions are left out.
    """

    source: str
    split: str = "test"
    purpose: Literal["training", "evaluation"] = "evaluation"
    scorer: Scorer = "math"
    license: str = "not stated"
    question: str = "problem"
    answer: str = "answer"
    row: Callable[[Row], Row] | None = None
    reads: tuple[str, ...] = ()
    id: str | None = None
    config: str | None = None
    revision: str | None = None
    folder: str | None = None
    keep: Mapping[str, Callable[[Any], Any] | str] = field(default_factory=dict)
    left_out: str = ""
    sample: int | None = None
    unique: str | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that are read. A set without one of them is refused."""
        read = (self.question, self.answer) if self.row is None else self.reads
        others = (self.id, self.unique and self.unique.partition(".")[0])
        return tuple(dict.fromkeys((*read, *self.keep, *filter(None, others))))

    def read(self, row: Row) -> Row:
        """A problem of a row: `question` or `prompt`, and `answer` or `tests`."""
        if self.row is not None:
            return self.row(row)
        return {"question": row[self.question].strip(), "answer": _text(row[self.answer])}

    def keeps(self, *values: Any) -> bool:
        """Whether a row is part of the set, by its values of the columns in `keep`."""
        pairs = zip(self.keep.values(), values, strict=True)
        return all(wanted(value) if callable(wanted) else value == wanted for wanted, value in pairs)


# How a row is read


def _text(answer: Any) -> str:
    if answer is None:
        raise ValueError("there is no answer")
    return str(answer).strip()


def make_tests(inputs: Sequence[Any], outputs: Sequence[Any], fn_name: str | None = None) -> str:
    """Tests of a program as JSON text.

    Args:
        inputs: standard inputs; with `fn_name`, lists of arguments.
        outputs: the outputs or results that belong to them.
        fn_name: function to call. `None` for a program that reads standard input.

    Raises:
        ValueError: when there are none, or not as many outputs as inputs.
    """
    if len(inputs) != len(outputs) or not inputs:
        raise ValueError(f"{len(inputs)} inputs and {len(outputs)} outputs")
    return json.dumps({"inputs": list(inputs), "outputs": list(outputs)} | ({"fn_name": fn_name} if fn_name else {}))


def _input_output(text: str) -> dict[str, Any]:
    """The tests of APPS, TACO and Eurus: JSON text with `inputs`, `outputs`, and perhaps `fn_name`."""
    tests = json.loads(text)
    return {
        "tests": make_tests(tests["inputs"], tests["outputs"], tests.get("fn_name")),
        "task": f"Write the function `{tests['fn_name']}`." if tests.get("fn_name") else STDIN,
    }


def _apps(row: Row) -> Row:
    starter = row["starter_code"] or ""
    begin = f"\n\nStart with this code:\n```python\n{starter.strip()}\n```" if starter.strip() else ""
    return {"question": row["question"].strip() + begin, **_input_output(row["input_output"])}


def _has_tests(text: str | None) -> bool:
    """Whether there are tests that can be read. A few functions have results of more digits than Python converts."""
    if text is not None and not isinstance(text, str):
        raise TypeError(f"the tests are a {type(text).__name__}, and no JSON text")
    if not text or text in ("{}", "null") or '"inputs": []' in text[:100]:
        return False
    if _LONG_NUMBER.search(text):
        try:
            json.loads(text)
        except ValueError:
            return False
    return True


def _code_contests(row: Row) -> Row:
    tests = [row[name] for name in ("public_tests", "private_tests", "generated_tests")]
    return {
        "question": row["description"].strip(),
        "tests": make_tests(
            [i for test in tests for i in test["input"]], [o for test in tests for o in test["output"]]
        ),
    }


def _codeforces(row: Row) -> Row:
    parts = [row["description"].strip()]
    for title, text in (("Input", row["input_format"]), ("Output", row["output_format"]), ("Note", row["note"])):
        parts += [f"{title}\n{text.strip()}"] if text else []
    parts += [f"Example input\n{e['input']}\nExample output\n{e['output']}" for e in row["examples"] or []]
    tests = row["official_tests"]
    return {
        "question": "\n\n".join(parts),
        "tests": make_tests([test["input"] for test in tests], [test["output"] for test in tests]),
    }


def _eurus(row: Row) -> Row:
    # The system message describes the actions of the set's own agent.
    messages = [message for message in row["prompt"] if message["role"] != "system"]
    problem = {
        "prompt": [{"role": message["role"], "content": message["content"].strip()} for message in messages],
        "question": messages[-1]["content"].strip(),
    }
    truth = row["reward_model"]["ground_truth"]
    if row["ability"] == "math":
        return problem | {"answer": _text(truth)}
    return problem | {"tests": _input_output(truth)["tests"]}


def _dapo(row: Row) -> Row:
    messages = [{"role": message["role"], "content": message["content"].strip()} for message in row["prompt"]]
    truth = row["reward_model"]["ground_truth"]
    return {"prompt": messages, "question": messages[-1]["content"], "answer": _text(truth)}


def _olympiad(row: Row) -> Row:
    answers = row["final_answer"]
    if not isinstance(answers, list):
        raise TypeError(f"final_answer is {answers!r} and no list")
    return {"question": row["question"].strip(), "answer": ", ".join(answers)}


def _humaneval(row: Row) -> Row:
    return {
        "question": f"```python\n{row['prompt'].rstrip()}\n```",
        "task": f"Complete the function `{row['entry_point']}`, and repeat its signature.",
        "tests": json.dumps({"check": row["test"], "entry_point": row["entry_point"]}),
    }


def _solvable(model: Row) -> bool:
    """Whether the `reward_model` of Eurus has tests that can be read."""
    return _has_tests(model["ground_truth"])


# The table

_code = partial(Benchmark, scorer="code")
_eurus_set = partial(
    Benchmark,
    source="PRIME-RL/Eurus-2-RL-Data",
    license="MIT",
    row=_eurus,
    reads=("prompt", "ability", "reward_model"),
)
_apps_set = partial(
    _code,
    row=_apps,
    reads=("question", "input_output", "starter_code"),
    keep={"input_output": _has_tests},
    left_out="problems without tests, or with numbers of more than 4,300 digits",
)

BENCHMARKS: dict[str, Benchmark] = {
    "dapo_math_17k": Benchmark(
        source="open-r1/DAPO-Math-17k-Processed",
        config="en",
        split="train",
        purpose="training",
        license="Apache-2.0",
        question="prompt",
        answer="solution",
        left_out="problems in Chinese (the configuration `en`)",
    ),
    "dapo_math_17k_original": Benchmark(
        source="BytedTsinghua-SIA/DAPO-Math-17k",
        split="train",
        purpose="training",
        license="Apache-2.0",
        row=_dapo,
        reads=("prompt", "reward_model"),
        unique="extra_info.index",
        left_out="repetitions of an `extra_info.index`: nearly all of 1.8 million rows",
    ),
    "eurus_math": _eurus_set(
        split="train",
        purpose="training",
        keep={"ability": "math"},
        left_out="code, and the system message of PRIME's agent",
    ),
    "eurus_code": _eurus_set(
        split="train",
        purpose="training",
        scorer="code",
        keep={"ability": "code", "reward_model": _solvable},
        left_out="mathematics, numbers of more than 4,300 digits, and the system message of PRIME's agent",
    ),
    "aime_2024": Benchmark(source="HuggingFaceH4/aime_2024", split="train", id="id"),
    "aime_2025": Benchmark(source="math-ai/aime25", license="Apache-2.0", id="id"),
    "amc_2023": Benchmark(source="math-ai/amc23", question="question", id="id"),
    "math_500": Benchmark(source="HuggingFaceH4/MATH-500", license="MIT", id="unique_id"),
    "olympiad_bench": Benchmark(
        source="Hothan/OlympiadBench",
        config="OE_TO_maths_en_COMP",
        split="train",
        license="Apache-2.0",
        row=_olympiad,
        reads=("question", "final_answer"),
        id="id",
        keep={"language": "English", "modality": "Text-only", "question_type": "Open-ended", "error": not_},
        left_out="proofs, other languages than English, problems with images, problems marked as erroneous",
    ),
    "apps": _apps_set(
        source="codeparrot/apps", revision="refs/convert/parquet", folder="all", license="MIT", id="problem_id"
    ),
    "code_contests": _code(
        source="deepmind/code_contests",
        license="CC BY 4.0",
        row=_code_contests,
        reads=("description", "public_tests", "private_tests", "generated_tests"),
        id="name",
        keep={"input_file": not_},
        left_out="problems that read a file",
    ),
    "taco": _apps_set(source="BAAI/TACO", folder="ALL", license="Apache-2.0"),
    "codeforces": _code(
        source="open-r1/codeforces",
        license="CC BY 4.0",
        row=_codeforces,
        reads=("description", "input_format", "output_format", "note", "examples", "official_tests"),
        id="id",
        keep={
            "input_mode": "stdio",
            "official_tests_complete": bool,
            "interaction_format": not_,
            "generated_checker": not_,
        },
        left_out="incomplete tests, several right outputs (a checker), interaction, files",
    ),
    "humaneval": _code(
        source="openai/openai_humaneval",
        license="MIT",
        row=_humaneval,
        reads=("prompt", "test", "entry_point"),
        id="task_id",
    ),
    # The paper's way: 100 random validation problems of a category.
    **{
        f"eurus_{category}_100": _eurus_set(
            split="validation",
            scorer="code",
            keep={"data_source": category, "reward_model": _solvable},
            left_out=f"other categories than {category}",
            sample=100,
        )
        for category in ("apps", "codecontests", "taco", "codeforces")
    },
}
