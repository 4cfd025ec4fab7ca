# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""A column that only the teacher sees: whole steps, records, and what the student is never given."""

import json

import pytest
import torch
from datasets import Dataset
from transformers.utils import logging

from omniopd_trl import OmniOPDConfig
from omniopd_trl.audits.types import Audit, ChunkAudit, Trajectory
from omniopd_trl.cli.main import main
from omniopd_trl.errors import ConfigError, DataError, TeacherError
from omniopd_trl.journal.browse import list_audits, read_audits
from omniopd_trl.method.chunks import Chunk
from omniopd_trl.report.page import _details
from omniopd_trl.report.runs import Run
from omniopd_trl.teachers import LocalTeacher, Prefix, ScriptedTeacher
from omniopd_trl.trainer import step_audits
from omniopd_trl.trainer.metrics import context_ratios
from omniopd_trl.trainer.plan import prompt_lengths
from tests.support.judge import judge
from tests.support.loopback import Loopback
from tests.support.loopback.teachers import SERVICES, services
from tests.support.teachers import Here, Unasked
from tests.support.training import FOUR_STEPS, make_trainer, questions, script, trainable

__all__ = ["services"]  # a fixture

MARK = "\nOnly you see: "
CONTEXT = {"teacher_context_column": "answer", "teacher_context_template": "{prompt}" + MARK + "{context}"}
BRANCHES = {"num_branches": 3, "chunk_length": 6, "min_chunk_length": 4, "num_rollouts": 2}


class Privileged(Here):
    """A teacher that answers as if it had not seen the context, and keeps what it saw by question."""

    def __init__(self):
        super().__init__()
        self.seen = []

    async def sample(self, prefixes, request):
        self.seen += [prefix.prompt[-1]["content"].partition(MARK)[::2] for prefix in prefixes]
        plain = [Prefix([{"role": "user", "content": question}], "") for question, _ in self.seen[-len(prefixes) :]]
        plain = [Prefix(one.prompt, prefix.completion) for one, prefix in zip(plain, prefixes, strict=True)]
        return await super().sample(plain, request)


def answers(dataset=None):
    return {row["prompt"][-1]["content"]: row["answer"] for row in dataset or questions()}


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model_dir):
    """A run of one step whose teacher sees the answers."""
    trainer = make_trainer(tmp_path_factory.mktemp("run"), tiny_model_dir, teacher=Privileged(), **CONTEXT)
    trainer.train()
    return trainer


def test_only_the_teacher_sees_it(run, tmp_path, tiny_model_dir):
    """A context without effect on the rollouts changes no weight: the student reads the same prompts as without."""
    plain = make_trainer(tmp_path, tiny_model_dir, teacher=Here())
    plain.train()
    there = trainable(plain.model)
    assert all(torch.equal(weights, there[name]) for name, weights in trainable(run.model).items())
    assert run.state.log_history[0]["loss"] == plain.state.log_history[0]["loss"]
    for key in ("prompt_ids", "prompt_mask", "completion_ids"):
        assert torch.equal(run.batches[0][key], plain.batches[0][key])
    assert dict(run.teacher.seen).items() <= answers().items()
    assert len(run.teacher.seen) > 8


def test_the_share_of_quotations_is_logged(run, tmp_path, tiny_model_dir):
    logs = run.state.log_history[0]
    # The script's rollouts hold "12" alone as a number, which is the answer to n = 3 only.
    audits = list(read_audits(run.args.output_dir, list_audits(run.args.output_dir)))
    quoted = [
        "12" in rollout.replace(":", " ").split() and audit.teacher_context == "12" and "12" not in chunk.prefix
        for audit in audits
        for chunk in audit.chunks
        for rollout in chunk.rollouts
    ]
    assert 0 < sum(quoted) < len(quoted)
    assert logs["rollouts/context_quoted"] == pytest.approx(sum(quoted) / len(quoted))
    plain = make_trainer(tmp_path, tiny_model_dir)
    plain.train()
    assert "rollouts/context_quoted" not in plain.state.log_history[0]


@pytest.mark.parametrize(("prefix", "quoted"), [("It is ", 1), ("It is 12, so ", 0)])
def test_what_the_student_wrote_before_is_no_quotation(prefix, quoted):
    chunk = ChunkAudit(Chunk(0, 4, 0), prefix, "x", ("12 apples",), (0.5,), 0.5, 0.5)
    trajectory = Trajectory("How many?", [], [], teacher_context="12")
    assert context_ratios([Audit((chunk,))], [trajectory]) == {"rollouts/context_quoted": (quoted, 1)}


def test_records_show_it(run, capsys, tmp_path):
    """The journal, `omniopd audits`, the report, the table of audits and the export."""
    folder = run.args.output_dir
    for audit in read_audits(folder, list_audits(folder)):
        assert audit.teacher_context == answers()[audit.prompt[-1]["content"]]
        assert _details(Run(folder), audit)["context"] == audit.teacher_context
    assert main(["audits", folder, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows
    assert all(row["teacher_context"] == answers()[row["prompt"][-1]["content"]] for row in rows)
    assert main(["audits", folder]) == 0
    assert "only the teacher saw: " in capsys.readouterr().out
    assert main(["export", folder, "--output", str(tmp_path / "export")]) == 0
    exported = Dataset.from_parquet(str(tmp_path / "export" / "data" / "*.parquet"))
    assert [row["teacher_context"] for row in exported] == [
        answers()[row["prompt"][-1]["content"]] for row in exported
    ]


def test_an_export_is_trained_on_again(run, tmp_path, tiny_model_dir):
    """The same weights and quotations, and other settings than recorded are refused."""
    assert main(["export", run.args.output_dir, "--output", str(tmp_path / "export")]) == 0
    source = f"export:{tmp_path / 'export'}"
    again = make_trainer(tmp_path / "again", tiny_model_dir, teacher=source, **CONTEXT)
    again.train()
    there = trainable(run.model)
    assert all(torch.equal(weights, there[name]) for name, weights in trainable(again.model).items())
    for name in ("rollouts/context_quoted", "loss"):
        assert again.state.log_history[0][name] == run.state.log_history[0][name]
    with pytest.raises(ConfigError, match="teacher_context_column is None and was 'answer'"):
        make_trainer(tmp_path / "other", tiny_model_dir, teacher=source)


@pytest.mark.parametrize("branches", [{}, BRANCHES], ids=["chunks", "branches"])
def test_a_resumed_run_replays_the_journal(tmp_path, tiny_model_dir, branches):
    """Nothing is asked again with the same context. With another template, everything is."""
    settings = {**FOUR_STEPS, "max_steps": 1, "save_strategy": "no", **CONTEXT, **branches}
    dataset = FOUR_STEPS["dataset"]
    first = make_trainer(tmp_path, tiny_model_dir, teacher=Here(), **settings)
    first.train()
    recorded = list(read_audits(tmp_path, list_audits(tmp_path)))
    assert [one.teacher_context for one in recorded] == [
        answers(dataset)[one.prompt[-1]["content"]] for one in recorded
    ]
    again = make_trainer(tmp_path, tiny_model_dir, teacher=Here.silent(), **settings)
    again.train(resume_from_checkpoint=True)
    there = trainable(first.model)
    assert all(torch.equal(weights, there[name]) for name, weights in trainable(again.model).items())
    settings["teacher_context_template"] = "{context} {prompt}"
    other = make_trainer(tmp_path, tiny_model_dir, teacher=Here.silent(), **settings)
    with pytest.raises(TeacherError, match="was asked again"):
        other.train(resume_from_checkpoint=True)


def test_the_teacher_is_asked_with_it_everywhere(tmp_path, tiny_model_dir):
    """The check of the prompts, the probe, evaluations, and the evaluation of the teacher."""

    class Checking(Privileged):
        def check_prompt(self, prompt):
            self.seen.append(prompt[-1]["content"].partition(MARK)[::2])

        def probe(self, prompt):
            self.check_prompt(prompt)

    teacher = Checking()
    trainer = make_trainer(
        tmp_path, tiny_model_dir, teacher=teacher, eval_dataset=questions(4), audit_eval=True, **CONTEXT
    )
    assert len(teacher.seen) == 8 + 4 + 1
    trainer.evaluate()
    trainer.evaluate_teacher()
    assert len(teacher.seen) > 8 + 4 + 1 + 4 + 4
    assert dict(teacher.seen) == answers()


def test_streams_and_plain_prompts(tmp_path, tiny_model_dir):
    """A prompt of plain text, and the rows of a stream, which are checked before the student answers them."""
    rows = [{"prompt": row["prompt"][-1]["content"], "answer": row["answer"]} for row in questions()]
    seen = []

    def answer(prefix, index):
        seen.append(prefix.prompt.partition(MARK)[::2])
        return script(Prefix([{"content": prefix.prompt}], prefix.completion), index)

    settings = {**CONTEXT, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    stream = Dataset.from_list(rows).to_iterable_dataset()
    make_trainer(tmp_path / "a", tiny_model_dir, teacher=ScriptedTeacher(answer), dataset=stream, **settings).train()
    assert dict(seen).items() <= {row["prompt"]: row["answer"] for row in rows}.items()
    for row in rows[3:]:  # the probe reads three
        row["answer"] = None
    stream = Dataset.from_list(rows).to_iterable_dataset()
    trainer = make_trainer(tmp_path / "b", tiny_model_dir, teacher=Here(), dataset=stream, **settings)
    with pytest.raises(DataError, match="teacher_context_column"):
        trainer.train()
    assert trainer.teacher.calls == 0


def test_a_stream_with_other_contexts(tmp_path, tiny_model_dir, caplog, monkeypatch):
    """A stream has no fingerprint. What was recorded with other contexts is not replayed, which is said."""
    logging.enable_propagation()
    settings = {**CONTEXT, "max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 0.0}

    def trained(last):
        rows = [{**row, "answer": last} for row in questions(8)]
        stream = Dataset.from_list(rows).to_iterable_dataset()
        trainer = make_trainer(tmp_path, tiny_model_dir, teacher=Here(), dataset=stream, **settings)
        trainer.train(resume_from_checkpoint=any(tmp_path.iterdir()))
        return trainer.teacher_usage.completion_tokens

    first = trained("7")
    assert trained("7") == 0
    assert "not replayed" not in caplog.text
    assert trained("8") == first
    said = "was recorded with other prompts, or other texts that only the teacher sees"
    assert caplog.text.count(said) == 1
    caplog.clear()
    # The same prompts here, and others in another process.
    gathered = step_audits.sum_over_processes
    monkeypatch.setattr(
        step_audits,
        "sum_over_processes",
        lambda accelerator, *counts: [0, 0, 1, *counts[3:]] if len(counts) == 5 else gathered(accelerator, *counts),
    )
    assert trained("8") == first
    assert caplog.text.count(said) == 1


def test_a_local_teacher_renders_it(tmp_path, tiny_model_dir):
    teacher = LocalTeacher(str(tiny_model_dir))
    args = OmniOPDConfig(str(tmp_path), use_cpu=True, bf16=False, **CONTEXT)
    row = questions()[3]
    text = teacher.tokenizer.decode(teacher.encode(Prefix(args.teacher_context.prompt(row), "So")))
    assert f"{row['prompt'][-1]['content']}{MARK}12" in text
    assert text.endswith("So")


@pytest.mark.parametrize("continuation", ["instruct", "prefill"])
def test_a_service_receives_it(tmp_path, tiny_model_dir, services, continuation):
    """The real SDK sends it in every request, and the student's prompts do not hold it."""
    service = next(service for service in SERVICES if service.name.startswith("anthropic"))
    settings = {"teacher_base_url": None, "teacher_continuation": continuation, "num_rollouts": 1, **CONTEXT}
    with Loopback(service.answer) as server:
        settings["teacher_base_url"] = server.url + service.path
        trainer = make_trainer(tmp_path, tiny_model_dir, teacher=service.name, dataset=questions(8), **settings)
        trainer.train()
    bodies = [json.dumps(request.body, ensure_ascii=False) for request in server.requests]
    assert len(bodies) > 8
    known = [json.dumps(f"{question}{MARK}{answer}")[1:-1] for question, answer in answers().items()]
    assert all(any(text in body for text in known) for body in bodies)
    ids = trainer.batches[0]["prompt_ids"]
    assert not any(MARK.strip() in text for text in trainer.processing_class.batch_decode(ids))


def test_a_judge_reads_it(tmp_path, tiny_model_dir):
    asked = []

    def answer(prefix, index):
        asked.append(prefix.prompt[1]["content"])
        return judge(prefix, index)

    make_trainer(tmp_path, tiny_model_dir, teacher=ScriptedTeacher(answer), signal="judge", **CONTEXT).train()
    assert asked
    known = [f"{question}{MARK}{context}" for question, context in answers().items()]
    assert all(any(text in question for text in known) for question in asked)


def test_the_forecast_counts_it(run):
    longer = prompt_lengths(questions(), run.processing_class, run.args)
    plain = OmniOPDConfig(run.args.output_dir, use_cpu=True, bf16=False)
    assert all(a > b for a, b in zip(longer, prompt_lengths(questions(), run.processing_class, plain), strict=True))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"teacher_context_column": "solution"}, DataError, "`train_dataset` has no column 'solution'"),
        ({"eval_dataset": True, "audit_eval": True}, DataError, "`eval_dataset` has no column 'answer'"),
    ],
)
def test_a_missing_column_is_refused_before_a_model_is_loaded(tmp_path, settings, error, message):
    if "eval_dataset" in settings:
        settings = {**settings, "eval_dataset": questions(2).remove_columns("answer")}
    with pytest.raises(error, match=message):
        make_trainer(tmp_path, tmp_path / "nowhere", teacher=Unasked(), **{**CONTEXT, **settings})


def test_the_share_that_repeats_the_question(tmp_path, tiny_model_dir):
    """Two of four students' answers are the question, and the others are empty."""
    trainer = make_trainer(tmp_path, tiny_model_dir, eval_dataset=questions(4))
    tokenizer, asked = trainer.processing_class, iter(questions(4))

    def sample(prompts, *args, **kwargs):
        texts = [row["prompt"][-1]["content"] for row, _ in zip(asked, prompts, strict=False)]
        return [
            tokenizer(text)["input_ids"] if "2 apples" in text or "3 apples" in text else [tokenizer.eos_token_id]
            for text in texts
        ], None

    trainer._sample = sample
    assert trainer.evaluate()["eval_completions/copied_share"] == 0.5


def test_an_evaluation_set_without_it(tmp_path, tiny_model_dir):
    """It is needed only where the teacher is asked."""
    other = questions(2).rename_column("answer", "solution")
    trainer = make_trainer(tmp_path, tiny_model_dir, teacher=Privileged(), eval_dataset=other, **CONTEXT)
    trainer.evaluate()
    with pytest.raises(DataError, match="`eval_dataset` has no column 'answer'"):
        trainer.evaluate_teacher()
