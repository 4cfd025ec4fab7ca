# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The verdicts on seven teachers and five judges of the demo's student, for the same trajectories and branches."""

import asyncio
from dataclasses import fields, replace

import pytest

from benchmarks.probe import SETTINGS, TEACHERS, probing_trainer
from omniopd_trl import OmniOPDConfig
from omniopd_trl.audits.auditor import Auditor
from omniopd_trl.evals.probe import Form, judge, measure, measure_marks
from omniopd_trl.method import get_similarity
from omniopd_trl.teachers import ScriptedTeacher, load_teacher
from omniopd_trl.teachers.instruct.judge import asked_marks
from omniopd_trl.trainer.probing import ReversedAuditor

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


def every(mark):
    """A judge whose marks follow from their numbers alone."""
    return ScriptedTeacher(lambda p, _: "\n".join(f"{n}: {mark(n)}" for n in range(1, asked_marks(p) + 1)))


# What makes each judge, what it should be judged, and why.
JUDGES = {
    "the demo's": (lambda: "demo:judge", "will teach", "prefers some branches"),
    "equal marks": (lambda: every(lambda n: 7), "will not", "equal marks (0.70 on average)"),
    "random marks": (ScriptedTeacher, "will not", "does not repeat its marks"),
    "every other one": (lambda: every(lambda n: 10 * (n % 2)), "will not", "does not repeat its marks"),
    "no marks": (lambda: ScriptedTeacher(["All is well."]), "will not", "100% of the forks got no marks"),
}


@pytest.mark.parametrize("name", JUDGES)
def test_verdict_on_a_judge(trainer, trajectories, name):
    make, expected, words = JUDGES[name]
    tokenizer, settings = trainer.processing_class, replace(trainer.auditor.settings, signal="judge")
    first, again = (
        [asyncio.run(auditor.audit(*row)) for row in trajectories]
        for auditor in (
            kind(load_teacher(make()), tokenizer, settings, get_similarity("exact"))
            for kind in (Auditor, ReversedAuditor)
        )
    )
    audits = [(*row, audit) for row, audit in zip(trajectories, first, strict=True)]
    numbers = measure_marks(audits, again, tokenizer, settings, (0.3, 0.7))
    config = OmniOPDConfig("unused", **SETTINGS | {"signal": "judge"})
    verdict = judge(numbers, Form(**{field.name: getattr(config, field.name) for field in fields(Form)}))
    assert verdict.kind == expected, verdict
    assert words in verdict.reason
    assert {advice.option: advice.value for advice in verdict.advice}.get("num_branches") == (
        7 if expected == "will teach" else None
    )
