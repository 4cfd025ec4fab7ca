# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Training from the export of an earlier run: nothing is asked, and the steps are those of that run."""

import pytest
import torch

from omniopd_trl.cli.main import main
from tests.support.teachers import Here
from tests.support.training import FOUR_STEPS, make_trainer, trainable

SETTINGS = {**FOUR_STEPS, "max_steps": 3, "save_strategy": "no"}


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tiny_model_dir):
    """A run of three steps, and the name of its export."""
    folder = tmp_path_factory.mktemp("run")
    trainer = make_trainer(folder, tiny_model_dir, teacher=Here(), **SETTINGS)
    trainer.train()
    assert main(["export", str(folder)]) == 0
    return trainer, f"export:{folder / '_export'}"


def retrained(path, model, source, **changes):
    trainer = make_trainer(path, model, teacher=source, **{**SETTINGS, **changes})
    trainer.train()
    return trainer


def test_the_same_settings_give_the_same_weights(exported, tmp_path, tiny_model_dir):
    """Bit for bit, at every step: the student is then the one that sampled, and its drift is 0."""
    first, source = exported
    again = retrained(tmp_path, tiny_model_dir, source)
    for name, weights in trainable(first.model).items():
        assert torch.equal(weights, trainable(again.model)[name]), name
    for entry, there in zip(again.state.log_history[:-1], first.state.log_history, strict=False):
        assert entry["loss"] == there["loss"]
        assert entry["off_policy/kl"] == entry["off_policy/truncated"] == 0
        assert entry["teacher/completion_tokens"] == 0
