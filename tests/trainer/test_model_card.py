# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The model card names base model, teacher, settings and cost, and no path of this machine."""

import json

import pytest
from huggingface_hub import ModelCard

from omniopd_trl.trainer.model_card import base_model_of


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
