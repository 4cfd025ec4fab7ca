# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The model card names base model, teacher, settings and cost, and no path of this machine."""

import json
import sys

import datasets
import pytest
from huggingface_hub import ModelCard
from peft import LoraConfig

import omniopd_trl
from omniopd_trl.data.prompts import prepare_prompts
from omniopd_trl.trainer.model_card import base_model_of, dataset_id_of, draw_figure
from tests.support import hub_stub
from tests.support.training import make_trainer, questions


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
    broken = folder(tmp_path / "broken", config={"_name_or_path": "org/model"})
    for header in ("base_model: [x", "base_model: org/model\nmodel-index: [a]"):
        (tmp_path / "broken" / "README.md").write_text(f"---\n{header}\n---\n# A card\n")
        assert base_model_of(broken) == "org/model"


def from_hub(name, split="train"):
    """Questions as `datasets` loads them from the Hub."""
    dataset = questions()
    dataset.info.download_checksums = {f"hf://datasets/{name}@e53f048/main/{split}-0.parquet": {"num_bytes": 9}}
    dataset._split = datasets.NamedSplit(split)
    return dataset


def test_dataset_ids():
    """A dataset of the Hub is known by its id, also when it was changed since; a local one and a stream are not."""
    assert dataset_id_of(prepare_prompts(from_hub("openai/gsm8k").select(range(4)))) == "openai/gsm8k"
    assert dataset_id_of(from_hub("squad")) == "squad"
    local = questions()
    local.info.download_checksums = {"/home/me/train.jsonl": {"num_bytes": 9}}
    for unknown in (local, questions(), questions().to_iterable_dataset(), None, {"a": from_hub("squad")}):
        assert dataset_id_of(unknown) is None


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
        "| student | a local model, derived from `Qwen/Qwen3-0.6B` |",
        "| training prompts | 8 |",
        "The license of the teacher, or the terms of its provider",
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


def test_metadata_links_and_results(tmp_path, make_tiny_model, monkeypatch):
    """The Hub links an adapter to its base model and its dataset, and shows the pass@1 of the evaluation set."""
    student = make_tiny_model(seed=4)
    ModelCard("---\nbase_model: Qwen/Qwen3-0.6B\n---\n# A card\n").save(student / "README.md")
    trainer = make_trainer(
        tmp_path / "run",
        student,
        dataset=from_hub("openai/gsm8k"),
        eval_dataset=from_hub("math-ai/aime24", "test"),
        peft_config=LoraConfig(r=2, target_modules=["q_proj"]),
    )
    monkeypatch.setattr(trainer.state, "log_history", [{"step": 3, "eval_pass@1": 0.51239}])
    trainer.create_model_card()
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert hub_stub.card_errors(card.content) == []
    data = card.data.to_dict()
    assert data["base_model"] == "Qwen/Qwen3-0.6B"
    assert data["base_model_relation"] == "adapter"
    assert data["library_name"] == "peft"
    assert data["pipeline_tag"] == "text-generation"
    assert data["datasets"] == "openai/gsm8k"
    assert {"trl", "omniopd", "lora", "transformers", "base_model:adapter:Qwen/Qwen3-0.6B"} <= set(data["tags"])
    (index,) = data["model-index"]
    assert index["name"] == "run"
    (result,) = index["results"]
    assert result["dataset"] == {"name": "math-ai/aime24", "type": "math-ai/aime24", "split": "test"}
    assert [(metric["type"], metric["value"]) for metric in result["metrics"]] == [("pass@1", 0.5124)]
    assert "| pass@1 | 0.512 (step 3) |" in card.text
    assert "This adapter belongs to the local model." in card.text


def my_phi(chunk, rollout):
    return 0.5


def my_weights(chunks):
    return chunks.posteriors


def test_custom_functions_are_named(tmp_path, tiny_model_dir):
    """The card does not claim the named similarity and baseline that custom functions replace."""
    trainer = make_trainer(tmp_path, tiny_model_dir, similarity=my_phi, chunk_weights=my_weights)
    trainer.create_model_card()
    text = (tmp_path / "README.md").read_text()
    assert "| similarity phi | `my_phi` |" in text
    assert "| baseline of the posterior | `my_weights` |" in text


def test_resumed_runs_count_all_tokens(tmp_path, tiny_model_dir):
    """The card counts what the whole run has cost, and not only what was asked since it was resumed."""
    dataset = questions(16)
    first = make_trainer(tmp_path, tiny_model_dir, dataset=dataset, save_strategy="steps", save_steps=1)
    first.train()
    second = make_trainer(tmp_path, tiny_model_dir, dataset=dataset, max_steps=2)
    second.train(resume_from_checkpoint=True)
    second.create_model_card()
    total = first.teacher_usage + second.teacher_usage
    assert 0 < second.teacher_usage.prompt_tokens < total.prompt_tokens
    expected = f"| teacher tokens | {total.prompt_tokens:,} read, {total.completion_tokens:,} written |"
    assert expected in (tmp_path / "README.md").read_text()


def test_figure(tmp_path, monkeypatch):
    """A figure needs two points and matplotlib; without it the card has none."""
    logs = [{"step": step, "chunk_loss": 2.0 - step} for step in range(2)]
    assert draw_figure(tmp_path, logs[:1]) is None
    assert draw_figure(tmp_path, logs) == "Chunk loss over 1 steps: chunk loss from 2 to 1."
    assert (tmp_path / "chunk_loss.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert draw_figure(tmp_path, logs) is None
