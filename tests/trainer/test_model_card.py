# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The model card names base model, teacher, settings and cost, and no path of this machine."""

import json

import pytest
from huggingface_hub import ModelCard

import omniopd_trl
from omniopd_trl.trainer.model_card import base_model_of
from tests.support.training import make_trainer


def folder(path, card=None, **files):
    path.mkdir()
    if card is not None:
        ModelCard(f"---\nbase_model: {card}\n---\n# A card\n").save(path / "README.md")
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return str(path)


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("Qwen/Qwen3-4B", "Qwen/Qwen3-4B"),
        ("gpt2", "gpt2"),
        (None, None),
        ("", None),
        ("./gone", None),
        ("/tmp/x", None),
    ],
)
def test_names(name, base):
    assert base_model_of(name) == base


def test_local_folders(tmp_path):
    first = folder(tmp_path / "first", card="Qwen/Qwen3-0.6B")
    assert base_model_of(first) == "Qwen/Qwen3-0.6B"
    adapter = folder(tmp_path / "adapter", adapter_config={"base_model_name_or_path": first})
    assert base_model_of(adapter) == "Qwen/Qwen3-0.6B"
    assert base_model_of(folder(tmp_path / "config", config={"_name_or_path": "org/model"})) == "org/model"
    assert base_model_of(folder(tmp_path / "plain", config={"hidden_size": 8})) is None
    several = folder(tmp_path / "several", card="\n- a/b\n- c/d")
    assert base_model_of(several) == "a/b"
    itself = folder(tmp_path / "itself", config={"_name_or_path": str(tmp_path / "itself")})
    assert base_model_of(itself) is None


def test_the_card_of_a_run(tmp_path, make_tiny_model, monkeypatch):
    """A local student is named by its own base model, and no path of this machine is in the card."""
    student = make_tiny_model(seed=3)
    ModelCard("---\nbase_model: Qwen/Qwen3-0.6B\n---\n# A card\n").save(student / "README.md")
    trainer = make_trainer(tmp_path / "run", student, max_steps=1)
    trainer.train()
    monkeypatch.setattr(
        trainer.state, "log_history", [{"step": 0, "eval_pass@1": 0.25}, {"step": 1, "eval_pass@1": 0.5}]
    )
    trainer.create_model_card(model_name="tiny")
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert card.data.base_model == "Qwen/Qwen3-0.6B"
    assert {"trl", "omniopd"} <= set(card.data.tags)
    for part in (
        f"| teacher | `{trainer.teacher.name}` |",
        "M = 2 of at most C = 10 tokens, N = 3 rollouts each",
        "0.250 (step 0) → 0.500 (step 1)",
        f"| teacher tokens | {trainer.teacher_usage.prompt_tokens:,} read",
        f"- omniopd_trl: {omniopd_trl.__version__}",
        "zhou2026omniopd",
        "a fine-tuned version of [Qwen/Qwen3-0.6B](https://huggingface.co/Qwen/Qwen3-0.6B)",
    ):
        assert part in card.text, part
    assert str(tmp_path) not in card.content
    assert "None" not in card.content


def test_the_card_of_a_student_of_unknown_origin(tmp_path, tiny_model_dir):
    trainer = make_trainer(tmp_path, tiny_model_dir)
    trainer.create_model_card()
    text = (tmp_path / "README.md").read_text()
    assert "This model is a fine-tuned model." in text
    assert "base_model" not in text
