# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Imitation of rollouts beside the paper's loss, and what is refused. With branches: `test_branches`."""

import re

import pytest
from transformers.utils import logging

from omniopd_trl.errors import ConfigError
from omniopd_trl.journal.browse import list_audits, read_audits
from tests.support import training
from tests.support.loopback import Loopback, wire
from tests.support.loopback.teachers import SERVICES, services
from tests.support.objective import check
from tests.support.teachers import Remote
from tests.support.training import FOUR_MICRO_BATCHES, LINES, Repeating, make_trainer

__all__ = ["services"]  # a fixture

IMITATION = {"rollout_imitation": 0.5, "min_anchor_entropy": 0.1}


@pytest.mark.parametrize(
    "settings",
    [
        {
            "teacher": Remote,
            "loss_normalization": "sum",
            "top_p": 0.8,
            "rollout_imitation_tokens": 8,
            **FOUR_MICRO_BATCHES,
        },
        {"mask_truncated_completions": True, "loss_normalization": "components", "pad_to_multiple_of": 64},
    ],
    ids=["filtered", "truncated"],
)
def test_gradient_equals_dense_reference(tmp_path, tiny_model_dir, tiny_tokenizer, caplog, settings):
    """No ratio for tokens that the student did not sample, and none of the filters.

    Random students write parts of characters, after which no text of a teacher can follow: a warning says so.
    """
    logging.enable_propagation()
    teacher = settings.get("teacher", lambda: None)()
    trainer = make_trainer(tmp_path, tiny_model_dir, **{**IMITATION, **settings, "teacher": teacher})
    logged = check(trainer, tiny_model_dir, tiny_tokenizer)
    assert logged["imitation/left_out"] > 0.2
    assert caplog.text.count("rollouts of a batch are not imitated at step 0") == 1


def test_rollouts_that_the_trajectory_shares(tmp_path, tiny_model_dir, tiny_tokenizer, monkeypatch):
    """Its own tokens are then in both terms of the loss."""
    monkeypatch.setattr(training, "script", training.repeat)
    settings = {"loss_normalization": "components", "rollout_imitation_tokens": 6}
    trainer = make_trainer(tmp_path, tiny_model_dir, **IMITATION, **settings)
    trainer.__class__ = Repeating
    logged = check(trainer, tiny_model_dir, tiny_tokenizer)
    assert trainer.batches[0]["imitation"].count_nonzero() > 20
    assert any(trainer.batches[0]["suffixes"])
    assert logged["imitation/left_out"] == 0


@pytest.mark.parametrize("continuation", ["prefill", "instruct"])
def test_a_single_rollout_of_a_service_that_trims(
    tmp_path, tiny_model_dir, tiny_tokenizer, monkeypatch, services, continuation
):
    """A teacher that writes what the student writes: similarities are 1, and the student's own tokens are imitated."""

    def rest(messages, index):
        said = messages[-1]["content"]
        said = said if isinstance(said, str) else "".join(part["text"] for part in said)
        before = re.search("<partial_solution>(.*?)</partial_solution>", said, re.DOTALL)
        before = before[1] if before else said if messages[-1]["role"] == "assistant" else ""
        return LINES[len(before) :].strip()

    monkeypatch.setattr(wire, "text_of", rest)
    service = next(service for service in SERVICES if service.name.startswith("anthropic"))
    settings = {**IMITATION, "similarity": "exact", "num_rollouts": 1, "teacher_temperature": 0.0, "num_chunks": 3}
    with Loopback(service.answer) as server:
        settings |= {"teacher_base_url": server.url + service.path, "teacher_continuation": continuation}
        trainer = make_trainer(tmp_path, tiny_model_dir, teacher=service.name, **settings)
        trainer.__class__ = Repeating
        trainer.train()
    logged, audits = trainer.state.log_history[0], [*read_audits(tmp_path, list_audits(tmp_path))]
    assert {chunk.text[0] == " " for audit in audits for chunk in audit.chunks} == {True, False}
    assert logged["audit/similarity"] == 1
    assert logged["imitation/left_out"] == 0
    for audit in audits:
        own = [audit.completion_ids[chunk.start :][:3] for chunk in audit.chunks]
        assert [chunk.imitated for chunk in audit.chunks] == [(tiny_tokenizer.decode([*ids]),) for ids in own]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rollout_imitation": 0.5}, "rollout_imitation=0.5 without a gate"),
        ({**IMITATION, "signal": "judge"}, "rollout_imitation=0.5 with signal='judge': there are no rollouts"),
        ({"rollout_imitation_tokens": 2}, "rollout_imitation_tokens=2 has no effect without imitation"),
        ({**IMITATION, "rollout_imitation_tokens": 11}, "rollout_imitation_tokens=11 is more than chunk_length=10"),
        ({**IMITATION, "rollout_imitation_tokens": 0}, "rollout_imitation_tokens=0 must be a whole number of at"),
        ({"rollout_imitation": -1.0}, "rollout_imitation=-1.0 must not be negative"),
    ],
)
def test_settings_without_a_meaning_are_refused(tmp_path, tiny_model_dir, settings, words):
    with pytest.raises(ConfigError, match=re.escape(words)) as caught:
        make_trainer(tmp_path, tiny_model_dir, **settings)
    assert "\n" not in str(caught.value)
