# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The verdicts on seven teachers of the demo's student, for the same trajectories and branches."""

import asyncio
from dataclasses import fields

import pytest

from benchmarks.probe import SETTINGS, TEACHERS, probing_trainer
from omniopd_trl import OmniOPDConfig
from omniopd_trl.audits.auditor import Auditor
from omniopd_trl.evals.probe import Form, judge, measure
from omniopd_trl.method import get_similarity
from omniopd_trl.teachers import ScriptedTeacher, load_teacher

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    return probing_trainer(ScriptedTeacher(), tmp_path_factory.mktemp("probe"))


@pytest.fixture(scope="module")
def trajectories(trainer):
    found, stopped = trainer.probe(4)
    assert len(found) == 32
    assert stopped is None
    return [(row.trajectory, row.scores) for row in found]


@pytest.mark.parametrize("name", TEACHERS)
def test_verdict(trainer, trajectories, name):
    make, expected = TEACHERS[name]
    tokenizer, settings = trainer.processing_class, trainer.auditor.settings
    auditor = Auditor(load_teacher(make()), tokenizer, settings, get_similarity("exact"))
    audits = [(t, scores, asyncio.run(auditor.audit(t, scores))) for t, scores in trajectories]
    failure = next((text for _, _, audit in audits for text in audit.failures), None)
    config = OmniOPDConfig("unused", **SETTINGS)
    form = Form(**{field.name: getattr(config, field.name) for field in fields(Form)})
    verdict = judge(measure(audits, tokenizer, settings, "exact"), form, failure)
    assert verdict.kind == expected, verdict
    if expected == "will teach":
        advice = {advice.option: advice.value for advice in verdict.advice}
        assert (advice["similarity"], advice["num_branches"], advice["num_rollouts"]) == ("exact", 7, 1)
    if expected == "will not":
        # By another similarity, which gives a number to unrelated texts, the teacher is no better.
        other = judge(measure(audits, tokenizer, settings, "edit"), form, failure)
        assert other.kind != "will teach", other
        assert not verdict.advice
