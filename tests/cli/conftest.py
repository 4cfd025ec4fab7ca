# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""A recipe for the commands."""

import json

import pytest
import yaml


@pytest.fixture
def recipe(tmp_path, tiny_model_dir):
    """A function that writes a recipe of a two-step run, and returns its path."""
    folder = tmp_path / "sums"
    folder.mkdir()
    for split, count in (("train", 16), ("test", 2)):
        rows = [{"question": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(count)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def write(**changes):
        settings = {
            "model_name_or_path": str(tiny_model_dir),
            "teacher_model_name_or_path": "scripted",
            "dataset_name": "sums",
            "output_dir": "out",
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "max_completion_length": 24,
            "num_chunks": 2,
            "chunk_length": 8,
            "num_rollouts": 2,
            "learning_rate": "1e-3",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "bf16": False,
            **changes,
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in settings.items() if value is not ...}))
        return str(path)

    return write
