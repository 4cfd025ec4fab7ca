# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""`omniopd solutions` with a service over loopback: its recipe, its answers and what it writes."""

import json
import re

import pytest
import yaml

from omniopd_trl.cli.main import main
from tests.support.loopback import wire

PROMPTS = 12


def question_of(body):
    """The question of a request."""
    return re.search(r"What is (\d+) \+ \1\?", json.dumps(body))[0]


def solve(path, body):
    """The right answer to questions about small numbers, a wrong one to the others, and a cut one to the last.

    In the form of the service whose path it is.
    """
    number = int(re.search(r"\d+", question_of(body))[0])

    def text(index):
        return f"Sum {index}. Answer: {2 * number if number < 8 else 1}"

    is_cut = number == PROMPTS - 1
    if "/messages" in path:
        answer = wire.anthropic(path, body)
        answer["content"][0]["text"] = text(0)
        answer["stop_reason"] = "max_tokens" if is_cut else "end_turn"
    elif "generateContent" in path:
        answer = wire.gemini(path, body)
        for index, candidate in enumerate(answer["candidates"]):
            candidate["content"]["parts"][0]["text"] = text(index)
            candidate["finishReason"] = "MAX_TOKENS" if is_cut else "STOP"
    else:
        answer = wire.openai(path, body)
        for index, choice in enumerate(answer["choices"]):
            choice["message"]["content"] = text(index)
            choice["finish_reason"] = "length" if is_cut else "stop"
    return answer


@pytest.fixture
def recipe(tmp_path, tiny_model_dir, monkeypatch, services):
    """A function that writes a recipe whose teacher is a server, and returns its path."""
    monkeypatch.chdir(tmp_path)
    rows = [{"question": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(PROMPTS)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def write(server, teacher="openai:gpt-6-luna", **changes):
        settings = {
            "model_name_or_path": str(tiny_model_dir),
            "teacher_model_name_or_path": teacher,
            "teacher_base_url": server.url + ("" if teacher.startswith(("anthropic", "gemini")) else "/v1"),
            "teacher_input_price": 1.0,
            "teacher_output_price": 10.0,
            "teacher_max_concurrency": 3,
            "dataset_name": "sums.jsonl",
            "output_dir": "out",
            "max_completion_length": 32,
            "chunk_length": 8,
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            **changes,
        }
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
        return "recipe.yaml"

    return write


def rows_of(folder="out/solutions"):
    with open(f"{folder}/solutions.jsonl") as file:
        return [json.loads(line) for line in file]


def solutions(path, *options):
    return main(["solutions", "--config", path, *options])
