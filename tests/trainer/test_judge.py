# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""`signal: judge` and the cascade in the trainer: the step, the journal, the metrics, and what is asked for."""

import json
import re

import pytest
import torch

from omniopd_trl.cli.main import main
from omniopd_trl.errors import BudgetError, ConfigError, DataError, TeacherError
from omniopd_trl.journal.browse import list_audits, read_audits
from omniopd_trl.report.page import OUTCOMES, _details
from omniopd_trl.report.runs import Run
from omniopd_trl.teachers import Rollout, ScriptedTeacher, Teacher, TeacherReply, Usage
from tests.support.judge import judge, mark_of, marks_for, openai
from tests.support.loopback import wire
from tests.support.loopback.server import Fault, Loopback
from tests.support.loopback.teachers import services  # noqa: F401
from tests.support.objective import check
from tests.support.training import FOUR_MICRO_BATCHES, FOUR_STEPS, make_trainer, questions, trainable

LOW, HIGH = 0.25, 0.75
CASCADE = {"signal": "cascade", "cascade_low": LOW, "cascade_high": HIGH}


class StrictJudge(ScriptedTeacher):
    """A judge whose chat template renders questions, and not the prompts of the dataset."""

    def check_prompt(self, prompt):
        if prompt[0]["role"] != "system":
            raise DataError("a conversation must begin with a system message")

    probe = check_prompt


class Judge(Teacher):
    """The tests' judge as a teacher that counts what it is asked for."""

    name = "judge"
    is_remote = True

    def __init__(self):
        self.questions, self.prefixes = [], []
        self.first_answers = []  # answers to the first questions, in place of marks
        self.must_not_be_asked = False

    @classmethod
    def of(cls, *first_answers, silent=False):
        teacher = cls()
        teacher.first_answers, teacher.must_not_be_asked = list(first_answers), silent
        return teacher

    async def sample(self, prefixes, request):
        if self.must_not_be_asked:
            raise TeacherError("the teacher was asked again")
        replies = []
        for prefix in prefixes:
            (self.questions if prefix.is_question else self.prefixes).append(prefix)
            texts = [judge(prefix, i) for i in range(request.num_samples)]
            if prefix.is_question and self.first_answers:
                texts = [self.first_answers.pop(0)]
            replies.append(TeacherReply(tuple(map(Rollout, texts)), Usage(100, 0, 10), outcomes={"requests": 1}))
        return replies


def is_clear(text):
    mark = mark_of(text)
    return mark if not LOW < mark < HIGH else None


# ---- The step ----


@pytest.mark.parametrize(
    ("settings", "marks"),
    [
        ({"signal": "judge", "loss_normalization": "sum", "prior_strength": 0.3, **FOUR_MICRO_BATCHES}, mark_of),
        ({**CASCADE, "num_chunks": 3, "loss_normalization": "components"}, is_clear),
    ],
    ids=["judge", "cascade"],
)
def test_gradient_equals_dense_reference(tmp_path, tiny_model_dir, tiny_tokenizer, settings, marks):
    """Loss, metrics and every weight's gradient, with a mark as one observation in Eq. 5."""
    trainer = make_trainer(tmp_path, tiny_model_dir, teacher=Judge(), **settings)
    logged = check(trainer, tiny_model_dir, tiny_tokenizer, mark_of=marks)
    teacher = trainer.teacher
    [batch] = trainer.batches
    completions = [
        tiny_tokenizer.decode(ids[mask.bool()], skip_special_tokens=True).rstrip("\ufffd")
        for ids, mask in zip(batch["completion_ids"], batch["completion_mask"], strict=True)
        if mask.sum() >= trainer.args.min_chunk_length
    ]
    read = [
        re.search("<solution>(.*)</solution>", question.prompt[1]["content"], re.DOTALL)[1]
        for question in teacher.questions
    ]
    assert sorted(re.sub("</?passage[^<>]*>", "", text) for text in read) == sorted(completions)
    assert len(completions) == 6, "one request for each trajectory that has chunks"
    if settings["signal"] == "judge":
        assert not teacher.prefixes
        assert logged["judge/frac_rollouts"] == 0
        assert logged["judge/mark"] == pytest.approx(logged["audit/similarity"])
        assert not {"audit/duplicate_rollouts", "audit/frac_similarity_zero"} & logged.keys()
    else:
        num_chunks = round(8 * logged["audit/num_chunks"])
        assert 0 < len(teacher.prefixes) < num_chunks
        assert logged["judge/frac_rollouts"] == pytest.approx(len(teacher.prefixes) / num_chunks)
    assert logged["judge/malformed"] == 0


def test_rollouts_need_no_judge(tmp_path, tiny_model_dir):
    """By default nothing is asked but continuations, and no metric is added."""
    teacher = Judge()
    trainer = make_trainer(tmp_path, tiny_model_dir, teacher=teacher)
    trainer.train()
    assert not teacher.questions
    assert not any(name.startswith("judge/") for name in trainer.state.log_history[0])
    assert all(chunk.mark is None for audit in read_audits(tmp_path, list_audits(tmp_path)) for chunk in audit.chunks)


def test_chunks_without_marks_are_dropped(tmp_path, tiny_model_dir):
    """Three answers of another form: the chunks of this trajectory are counted, and too many stop the run."""
    teacher, settings = Judge.of(*["Sure! All are fine."] * 3), {"signal": "judge", "max_failed_chunks": 0.5}
    trainer = make_trainer(tmp_path, tiny_model_dir, teacher=teacher, **settings)
    trainer.train()
    logged = trainer.state.log_history[0]
    assert 0 < logged["audit/dropped_chunks"] < 0.5
    num_questions = len(teacher.questions)
    assert logged["judge/malformed"] == pytest.approx(3 / num_questions)
    again = make_trainer(tmp_path, tiny_model_dir, teacher=Judge.of(silent=True), **settings)
    again.train(resume_from_checkpoint=True)
    replayed = again.state.log_history[0]
    assert replayed["judge/malformed"] == logged["judge/malformed"], "replayed answers are in the share"
    [audit] = [a for a in read_audits(tmp_path, list_audits(tmp_path)) if a.num_dropped]
    assert audit.answers == ("Sure! All are fine.",) * 3
    assert audit.failures[0].startswith("no marks: 3 answers of the judge are not the")
    assert audit.outcomes["malformed"] == 3
    assert audit.usage == Usage(300, 0, 30)
    failing = make_trainer(tmp_path / "b", tiny_model_dir, teacher=Judge.of(*["No."] * 99), signal="judge")
    with pytest.raises(
        TeacherError, match=r"chunks got no mark, more than max_failed_chunks=0\.2.*no marks: 3 answers"
    ):
        failing.train()


# ---- The journal ----

RUN = {**FOUR_STEPS, "max_steps": 2, "save_steps": 1}


def test_recorded_marks_are_replayed(tmp_path, tiny_model_dir):
    """The same step without a request, and another signal asks again."""
    first = make_trainer(tmp_path, tiny_model_dir, teacher=Judge(), **CASCADE, **RUN)
    first.train()
    silent = Judge.of(silent=True)
    again = make_trainer(tmp_path, tiny_model_dir, teacher=silent, **CASCADE, **RUN)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    torch.testing.assert_close(trainable(again.model), trainable(first.model), rtol=0, atol=1e-6)
    assert again.state.log_history[1]["judge/mark"] == first.state.log_history[1]["judge/mark"]
    other = make_trainer(tmp_path, tiny_model_dir, teacher=Judge.of(silent=True), signal="judge", **RUN)
    with pytest.raises(TeacherError, match="the teacher was asked again"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


SERVICE = {"teacher": "openai:gpt-6-luna", "save_strategy": "no", "teacher_max_concurrency": 1, "signal": "judge"}


def write_marks(messages):
    return marks_for(messages[1]["content"])


def test_no_answer_is_paid_twice(tmp_path, tiny_model_dir, services):  # noqa: F811
    """A run that stops in the middle keeps its answers, a malformed one included; the next one asks for the others."""
    first = []

    def answer(messages):
        if len(messages) == 2:
            first.append(messages)
        return "Sure!" if messages in first[1:2] else write_marks(messages)  # the first one is the probe

    refused = Fault(429, wire.openai_error(429, "You exceeded your current quota", "insufficient_quota"))
    with Loopback(openai(answer), fault=lambda number, body: refused if number >= 5 else None) as server:
        settings = {**SERVICE, "teacher_base_url": server.url + "/v1"}
        with pytest.raises(TeacherError, match="quota"):
            make_trainer(tmp_path, tiny_model_dir, **settings).train()
        before, server.fault = len(server.requests), None
        make_trainer(tmp_path, tiny_model_dir, **settings).train(resume_from_checkpoint=True)
        answered = server.bodies[1:5] + server.bodies[before + 1 :]  # without the probes
        asked = [body["messages"] for body in answered]
    audits = list(read_audits(tmp_path, list_audits(tmp_path)))
    [corrected] = [audit for audit in audits if len(audit.answers) > 1]
    assert corrected.answers[0] == "Sure!"
    assert len(corrected.answers) == 2
    num_asked = sum(bool(audit.chunks) for audit in audits)
    assert len(asked) == num_asked + 1, "an answer is asked for again"
    assert len({str(messages) for messages in asked}) == len(asked)
    assert sum(audit.usage.completion_tokens for audit in audits) == 10 * (num_asked + 1)


def test_what_people_see_of_marks(tmp_path, tiny_model_dir, capsys):
    """The journal, `omniopd audits`, the table, the page and an export hold the marks and what the judge wrote."""
    trainer = make_trainer(
        tmp_path,
        tiny_model_dir,
        teacher=Judge.of("Hm."),
        log_completions=True,
        num_branches=2,
        **{**CASCADE, "cascade_low": 0.4, "cascade_high": 0.6},
    )
    trainer.train()
    printed = capsys.readouterr().out
    assert "the judge wrote: 1: " in printed
    kinds, extreme = set(), 0
    of_rollouts = [has for name, has in OUTCOMES if name.startswith(("a chunk has no", "a chunk equals"))]
    for audit in read_audits(tmp_path, list_audits(tmp_path)):
        assert bool(audit.answers) == bool(audit.chunks)
        if not any(chunk.rollouts for chunk in audit.chunks):
            extreme += any(chunk.mark in (0, 1) for chunk in audit.chunks)
            assert not any(has(audit) for has in of_rollouts), "a mark is no rollout"
        for chunk in audit.chunks:
            assert chunk.mark == mark_of(chunk.text)
            kinds.add(bool(chunk.rollouts))
            if not chunk.rollouts:
                assert chunk.similarities == (chunk.mark,)
                assert [b.similarity for b in chunk.branches] == [mark_of(b.text) for b in chunk.branches]
    assert kinds == {True, False}
    assert extreme
    assert main(["audits", str(tmp_path), "--json", "--best", "99"]) == 0
    shown = json.loads(capsys.readouterr().out)
    marked = [one for one in shown if not one["rollouts"]]
    assert all(one["mark"] == mark_of(one["student"]) for one in shown)
    assert all(one["num_rollouts"] == 0 for one in marked)
    assert ["Hm."] in [one["trajectory_judge_answers"][:1] for one in shown]
    run = Run(tmp_path)
    assert "the judge wrote: Hm." in str([_details(run, one) for one in read_audits(tmp_path, run.places)])
    assert main(["export", str(tmp_path), "-o", str(tmp_path / "export")]) == 0
    assert "It holds marks of a judge, so no run can train from it." in capsys.readouterr().out
    assert json.loads((tmp_path / "export" / "export.json").read_text())["settings"]["signal"] == "cascade"
    written = (tmp_path / "export" / "README.md").read_text()
    assert "it holds marks of a judge" in written
    assert "omniopd train" not in written


# ---- Money ----


def test_a_budget_stops_a_judge(tmp_path, tiny_model_dir, services):  # noqa: F811
    """The worst case of a question is reserved: the limit is not passed."""
    with Loopback(openai(write_marks)) as server:
        settings = {**SERVICE, "teacher_base_url": server.url + "/v1", "teacher_budget_tokens": 3500}
        trainer = make_trainer(tmp_path, tiny_model_dir, **settings)
        with pytest.raises(BudgetError, match="teacher_budget_tokens=3500"):
            trainer.train()
        assert 0 < trainer.teacher.budget.tokens_spent <= 3500


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"signal": "marks"}, "signal='marks' is unknown; choose one of rollouts, judge, cascade"),
        ({"cascade_low": 0.2}, "cascade_low=0.2 has no effect with signal='rollouts'"),
        ({"signal": "judge", "cascade_high": 0.9}, "cascade_high=0.9 has no effect with signal='judge'"),
        ({"signal": "cascade", "cascade_low": 0.7}, "cascade_low=0.7 is not below cascade_high=0.7"),
        ({"signal": "cascade", "cascade_high": 1.5}, "cascade_high=1.5 must be at most 1"),
        ({"signal": "cascade", "cascade_low": -0.5}, "cascade_low=-0.5 must not be negative"),
        ({"signal": "judge", "min_rollouts": 2}, "min_rollouts=2 with signal='judge'"),
        ({"signal": "judge", "first_rollouts": 2}, "first_rollouts=2 with signal='judge'"),
    ],
)
def test_settings_without_a_meaning_are_refused(tmp_path, tiny_model_dir, settings, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        make_trainer(tmp_path, tiny_model_dir, **settings)


def test_an_evaluation_asks_for_marks(tmp_path, tiny_model_dir):
    teacher = Judge()
    trainer = make_trainer(
        tmp_path, tiny_model_dir, teacher=teacher, signal="judge", audit_eval=True, eval_dataset=questions(4)
    )
    logged = trainer.evaluate()
    assert logged["eval_judge/mark"] == pytest.approx(logged["eval_audit/similarity"])
    assert teacher.questions
    assert not teacher.prefixes


def test_a_judge_need_not_render_the_prompts(tmp_path, tiny_model_dir):
    """It renders its questions, whatever the dataset holds. A cascade continues the prompts as well."""
    make_trainer(tmp_path / "judge", tiny_model_dir, teacher=StrictJudge(judge), signal="judge").train()
    with pytest.raises(DataError, match="Row 0 of `train_dataset`: a conversation must begin with a system message"):
        make_trainer(tmp_path / "cascade", tiny_model_dir, teacher=StrictJudge(judge), **CASCADE)


def test_the_default_scripted_teacher_can_judge(tmp_path, tiny_model_dir):
    trainer = make_trainer(tmp_path, tiny_model_dir, teacher=ScriptedTeacher(), signal="judge", num_branches=2)
    trainer.train()
    assert trainer.state.log_history[0]["judge/malformed"] == 0
