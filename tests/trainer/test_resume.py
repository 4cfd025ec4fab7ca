# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Runs that end too soon: what was paid for is not paid for again."""

import errno
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from safetensors import SafetensorError
from transformers import TrainerCallback
from transformers.utils import logging

from omniopd_trl.errors import BudgetError, DataError, OmniOPDError, TeacherError
from omniopd_trl.journal.file import journal_path
from omniopd_trl.journal.reader import spent
from omniopd_trl.journal.schema import JournalError
from omniopd_trl.journal.store import Journal
from omniopd_trl.teachers import Rollout, Usage
from omniopd_trl.trainer import recording
from omniopd_trl.trainer.checkpoints import last_checkpoint
from tests.support import ROOT
from tests.support.objective import LORA
from tests.support.teachers import Here, Remote
from tests.support.training import FOUR_STEPS, make_trainer, questions, trainable


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model_dir):
    """A run of four steps that has ended."""
    trainer = make_trainer(tmp_path_factory.mktemp("finished"), tiny_model_dir, teacher=Here(), **FOUR_STEPS)
    trainer.train()
    return trainer


@pytest.fixture
def first(finished, tmp_path):
    """The run that has ended, with a copy of its folder in `tmp_path`."""
    shutil.copytree(finished.args.output_dir, tmp_path, dirs_exist_ok=True)
    return finished


@pytest.mark.parametrize(
    ("teacher", "leaves_out"), [(Here, False), (Remote, False), (Remote, True)], ids=["here", "remote", "truncated"]
)
def test_journaled_steps_are_replayed_without_a_request(tmp_path, tiny_model_dir, teacher, leaves_out):
    """From the last checkpoint: same trajectories, same rollouts, same weights, no request; usage counts once."""
    settings = {**FOUR_STEPS, "mask_truncated_completions": leaves_out}
    first = make_trainer(tmp_path, tiny_model_dir, teacher=teacher(), **settings)
    first.train()
    paid = spent(tmp_path)
    assert paid[0] == first.teacher_usage
    assert paid[0].completion_tokens > 0

    again = make_trainer(tmp_path, tiny_model_dir, teacher=teacher.silent(), **{**settings, "ref_model_offload": True})
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    torch.testing.assert_close(trainable(again.model), trainable(first.model), rtol=0, atol=1e-5)
    assert again.state.log_history[3]["loss"] == pytest.approx(first.state.log_history[3]["loss"], abs=1e-5)
    assert again.state.log_history[3]["teacher/completion_tokens"] == 0
    assert again.teacher_usage == Usage()
    assert spent(tmp_path) == paid


@pytest.mark.parametrize(
    "length", [{"max_steps": 2}, {"max_steps": -1, "num_train_epochs": 0.5}], ids=["steps", "epochs"]
)
def test_a_run_that_has_ended_takes_no_more_steps(tmp_path, tiny_model_dir, length):
    """It ends in the middle of an epoch. Started again, as by a scheduler, it neither asks nor trains."""
    settings = {**FOUR_STEPS, **length}
    first = make_trainer(tmp_path, tiny_model_dir, teacher=Here(), **settings)
    first.train()
    again = make_trainer(tmp_path, tiny_model_dir, teacher=Here.silent(), **settings)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == first.state.global_step == 2
    torch.testing.assert_close(trainable(again.model), trainable(first.model), rtol=0, atol=0)


ONE_STEP = {**FOUR_STEPS, "max_steps": 1, "save_strategy": "no"}


class Versioned(Here):
    """Answers that depend on state which nothing tells the trainer about: what is behind a service may change."""

    async def sample(self, prefixes, request):
        replies = await super().sample(prefixes, request)
        if not hasattr(self, "version"):
            return replies
        rollouts = tuple(Rollout(self.version) for _ in range(request.num_samples))
        return [replace(reply, rollouts=rollouts) for reply in replies]


@pytest.mark.case("U1")
def test_a_run_that_does_not_resume_starts_over(tmp_path, tiny_model_dir, caplog):
    """It asks for everything and says so; the ledger and the old records stay; resuming it replays its own records."""
    logging.enable_propagation()
    old = make_trainer(tmp_path, tiny_model_dir, teacher=Versioned(), **ONE_STEP)
    old.train()
    assert "This run starts over" not in caplog.text
    assert "paid again" not in caplog.text
    paid, _ = spent(tmp_path)

    teacher = Versioned()
    teacher.version = "something else"
    fresh = make_trainer(tmp_path, tiny_model_dir, teacher=teacher, **ONE_STEP)
    fresh.train()
    (line,) = re.findall(r"This run starts over\. .*", caplog.text)
    assert f"1 recorded step of an earlier run in {tmp_path / '_audits'} is not replayed" in line
    assert "--resume_from_checkpoint true" in line
    assert "from the journal" not in caplog.text
    assert fresh.teacher_usage == old.teacher_usage
    assert spent(tmp_path)[0] == paid + paid
    similarity = [trainer.state.log_history[0]["audit/similarity"] for trainer in (old, fresh)]
    assert similarity[0] != similarity[1]

    again = make_trainer(tmp_path, tiny_model_dir, teacher=Versioned.silent(), **ONE_STEP)
    again.train(resume_from_checkpoint=True)
    assert "step 0: 8 of 8 audits from the journal" in caplog.text
    assert again.state.log_history[0]["audit/similarity"] == pytest.approx(similarity[1])
    with closing(sqlite3.connect(journal_path(tmp_path, 0))) as db:
        assert db.execute("SELECT count(*) FROM audits").fetchone() == (16,)


@pytest.mark.case("U1")
def test_a_run_that_starts_over_by_mistake(tmp_path, tiny_model_dir, caplog):
    """Stopped before the teacher has answered, as its message advises, it takes nothing from the earlier run."""
    logging.enable_propagation()
    make_trainer(tmp_path, tiny_model_dir, teacher=Here(), **ONE_STEP).train()
    with pytest.raises(TeacherError, match="asked again"):
        make_trainer(tmp_path, tiny_model_dir, teacher=Here.silent(), **ONE_STEP).train()
    again = make_trainer(tmp_path, tiny_model_dir, teacher=Here.silent(), **ONE_STEP)
    again.train(resume_from_checkpoint=True)
    assert "step 0: 8 of 8 audits from the journal" in caplog.text


@pytest.mark.case("U1")
@pytest.mark.usefixtures("first")
def test_a_checkpoint_that_is_not_of_the_newest_run(tmp_path, tiny_model_dir, caplog):
    """A folder in which a run was started over holds checkpoints of both, and the later step may be the older one."""
    logging.enable_propagation()
    make_trainer(tmp_path, tiny_model_dir, teacher=Here(), callbacks=[StopAt(1)], **FOUR_STEPS).train()
    assert "newest run" not in caplog.text
    older = make_trainer(tmp_path, tiny_model_dir, teacher=Here(), callbacks=[StopAt(3)], **FOUR_STEPS)
    older.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert (
        "checkpoint of step 2 is not of the newest run in this folder, which has recorded steps up to 0" in caplog.text
    )
    assert older.teacher.calls > 0


@pytest.mark.parametrize(
    ("saved", "resumed", "words"),
    [
        ({}, {"peft_config": LoraConfig(**LORA)}, "holds a whole model, and the student has adapters"),
        ({"peft_config": LoraConfig(**LORA)}, {}, "holds adapters, and the student has none"),
    ],
)
def test_adapters_that_were_added_or_left_out(tmp_path, tiny_model_dir, saved, resumed, words):
    """Said before anything is loaded or asked."""
    settings = {**FOUR_STEPS, "max_steps": 1, "save_steps": 1}
    make_trainer(tmp_path, tiny_model_dir, teacher=Here(), **settings, **saved).train()
    trainer = make_trainer(tmp_path, tiny_model_dir, teacher=Here.silent(), **{**settings, "max_steps": 2}, **resumed)
    with pytest.raises(DataError, match=f"checkpoint-1 {words}"):
        trainer.train(resume_from_checkpoint=True)


def test_nothing_to_resume(tmp_path, tiny_model_dir):
    """A folder without checkpoint and journal is probably not the one that was meant."""
    trainer = make_trainer(tmp_path / "other", tiny_model_dir, teacher=Here.silent(), **ONE_STEP)
    with pytest.raises(DataError, match="neither a complete checkpoint nor a journal"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(DataError, match="there is no such folder"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))


def test_the_random_state_of_a_process_is_missing(tmp_path, monkeypatch, caplog):
    """The checkpoint is whole for process 0 only, and a resumed run would not continue exactly."""
    logging.enable_propagation()
    checkpoint = tmp_path / "checkpoint-2"
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").write_text("{}")
    processes = SimpleNamespace(num_processes=2, process_index=0)
    for name in ("rng_state_0.pth", "rng_state_1.pth"):
        there = [(checkpoint / f"rng_state_{process}.pth").exists for process in range(2)]
        monkeypatch.setattr(
            recording,
            "gather_object",
            lambda own, there=there: own * 2 if own != [True] else [f() for f in there],
        )
        (checkpoint / name).touch()
        caplog.clear()
        assert recording.checkpoint_to_resume(True, str(tmp_path), processes) == str(checkpoint)
        assert ("holds the random state of 1 of 2 processes" in caplog.text) == (name == "rng_state_0.pth")


class DeleteAudits(TrainerCallback):
    """Deletes the journal's folder after the first step."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            shutil.rmtree(journal_path(args.output_dir, 0).parent)


@pytest.mark.case("U11")
def test_the_journal_is_deleted_during_a_run(tmp_path, tiny_model_dir, caplog):
    """It is restored with everything that was in it, and the log says so: nothing is paid twice or forgotten."""
    logging.enable_propagation()
    settings = {**FOUR_STEPS, "max_steps": 2, "save_strategy": "no"}
    trainer = make_trainer(tmp_path, tiny_model_dir, teacher=Here(), callbacks=[DeleteAudits()], **settings)
    trainer.train()
    assert caplog.text.count("was deleted while this run was writing it") == 1
    assert spent(tmp_path)[0] == trainer.teacher_usage
    again = make_trainer(tmp_path, tiny_model_dir, teacher=Here.silent(), **settings)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 2


class StopAt(TrainerCallback):
    """Ends a run after a step, as a kill would."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def test_a_resumed_run_continues_like_one_that_was_never_interrupted(tmp_path, tiny_model_dir):
    """Steps that are generated after replayed ones, in a later epoch: the same prompts, completions and weights."""
    settings = {**FOUR_STEPS, "max_steps": 5, "save_steps": 1, "dataset": questions(16)}
    whole = make_trainer(tmp_path / "whole", tiny_model_dir, teacher=Here(), **settings)
    whole.train()
    cut = make_trainer(tmp_path / "cut", tiny_model_dir, teacher=Here(), callbacks=[StopAt(3)], **settings)
    cut.train()
    again = make_trainer(tmp_path / "cut", tiny_model_dir, teacher=Here(), **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-2"))  # an epoch has two steps
    for there, here in zip(whole.batches[2:], again.batches, strict=True):
        assert here["prompts"] == there["prompts"]
        assert torch.equal(here["completion_ids"], there["completion_ids"])
    torch.testing.assert_close(trainable(again.model), trainable(whole.model), rtol=0, atol=1e-6)
    # Epochs are shuffled, each in another way.
    epochs = [[str(p) for batch in whole.batches[i : i + 2] for p in batch["prompts"]] for i in (0, 2)]
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert epochs[0] != epochs[1]


@pytest.mark.usefixtures("first")
def test_other_settings_are_requested_again(tmp_path, tiny_model_dir, caplog):
    """A step of another learning rate is another step: its records are counted, not replayed, and that is said."""
    logging.enable_propagation()
    paid, _ = spent(tmp_path)
    changes = {"learning_rate": 0.06, "min_rollouts": 2, "logging_steps": 2}
    other = make_trainer(tmp_path, tiny_model_dir, teacher=Here(), **{**FOUR_STEPS, **changes})
    other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert other.teacher_usage.completion_tokens > 0
    assert spent(tmp_path)[0] == paid + other.teacher_usage
    said = [record.getMessage() for record in caplog.records if "paid again" in record.getMessage()]
    assert said == [
        "2 recorded steps are not replayed, since learning_rate was 0.05 and is 0.06, min_rollouts was 1 and is 2: "
        "the teacher is asked again and paid again. Restore the settings, or continue."
    ]


def test_settings_that_are_put_back_replay(tmp_path, tiny_model_dir, caplog):
    """The warning's advice works, also for who read it after the run had begun; with other prompts, that is said."""
    logging.enable_propagation()
    settings = {**FOUR_STEPS, "max_steps": 2, "save_strategy": "no"}
    make_trainer(tmp_path, tiny_model_dir, teacher=Here(), **settings).train()

    with pytest.raises(TeacherError, match="asked again"):
        other = make_trainer(tmp_path, tiny_model_dir, teacher=Here.silent(), **{**settings, "max_steps": 3})
        other.train(resume_from_checkpoint=True)
    assert "2 recorded steps are not replayed, since max_steps was 2 and is 3:" in caplog.text
    caplog.clear()
    make_trainer(tmp_path, tiny_model_dir, teacher=Here.silent(), **settings).train(resume_from_checkpoint=True)
    assert "not replayed" not in caplog.text

    shuffled = make_trainer(tmp_path, tiny_model_dir, teacher=Here(), **settings)
    rows = shuffled.train_dataset._fingerprint
    shuffled.train_dataset = shuffled.train_dataset.select(range(31, -1, -1))
    shuffled.train_dataset._fingerprint = rows  # as a stream, which has none
    shuffled.train(resume_from_checkpoint=True)
    assert caplog.text.count("was recorded with other prompts") == 1


def test_a_checkpoint_that_was_not_written_to_its_end_is_passed_over(tmp_path, tiny_model_dir, caplog, first):
    """A run that is killed while it saves resumes from the one before, pays nothing again, and saves again."""
    logging.enable_propagation()
    for name in ("model.safetensors", "trainer_state.json"):  # as a kill in the middle of saving leaves it
        (tmp_path / "checkpoint-4" / name).unlink()
    again = make_trainer(tmp_path, tiny_model_dir, teacher=Here.silent(), **FOUR_STEPS)
    again.train(resume_from_checkpoint=True)
    assert "checkpoint-4 is incomplete" in caplog.text
    torch.testing.assert_close(trainable(again.model), trainable(first.model), rtol=0, atol=1e-5)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")


class StopInTheMiddle(TrainerCallback):
    """Control-C in the second micro-batch of the second step, once."""

    def __init__(self):
        self.micro_batches = 0

    def on_substep_end(self, args, state, control, **kwargs):
        self.micro_batches += 1
        if self.micro_batches == 3 + 2:  # the last one of a step is no substep
            raise KeyboardInterrupt


@pytest.mark.parametrize("teacher", [Here, Remote])
def test_an_interrupted_step_starts_over_in_the_same_process(tmp_path, tiny_model_dir, teacher):
    """As in a notebook: the micro-batches that were left are not trained on, and each step generates its own."""
    settings = {**FOUR_STEPS, "save_steps": 1}
    whole = make_trainer(tmp_path / "whole", tiny_model_dir, teacher=teacher(), **settings)
    whole.train()
    cut = make_trainer(tmp_path / "cut", tiny_model_dir, teacher=teacher(), callbacks=[StopInTheMiddle()], **settings)
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    del cut.batches[1:]
    cut.train(resume_from_checkpoint=True)
    for there, here in zip(whole.batches, cut.batches, strict=True):
        assert torch.equal(here["completion_ids"], there["completion_ids"])
    torch.testing.assert_close(trainable(cut.model), trainable(whole.model), rtol=0, atol=1e-5)


def test_a_failed_step_starts_over_in_the_same_process(tmp_path, tiny_model_dir):
    """Fixed and resumed, as the message says: all of the step's trajectories are audited."""
    teacher = Remote(fail_at=10)
    trainer = make_trainer(tmp_path, tiny_model_dir, teacher=teacher, **FOUR_STEPS)
    with pytest.raises(TeacherError, match="Stopped at step 1"):
        trainer.train()
    teacher.fail_at = None
    trainer.train(resume_from_checkpoint=True)
    whole = make_trainer(tmp_path / "whole", tiny_model_dir, teacher=Remote(), **FOUR_STEPS)
    whole.train()
    torch.testing.assert_close(trainable(trainer.model), trainable(whole.model), rtol=0, atol=1e-5)


@pytest.mark.usefixtures("first")
def test_a_kill_while_a_checkpoint_is_written_over(tmp_path, tiny_model_dir, monkeypatch):
    """What an earlier run left there does not make the new one look whole."""
    again = make_trainer(tmp_path, tiny_model_dir, teacher=Here(), **FOUR_STEPS)

    def killed(output_dir):
        if output_dir.endswith("checkpoint-4"):
            raise KeyboardInterrupt  # the model is written, the optimizer is not

    monkeypatch.setattr(again, "_save_optimizer_and_scheduler", killed)
    with pytest.raises(KeyboardInterrupt):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


@pytest.mark.parametrize("resumed", [False, True])
def test_a_whole_checkpoint_is_not_put_at_risk(tmp_path, tiny_model_dir, monkeypatch, resumed):
    """A teacher that fails right after a checkpoint was saved, or loaded, leaves it as it is."""
    teacher = Here()
    trainer = make_trainer(tmp_path, tiny_model_dir, teacher=teacher, **{**FOUR_STEPS, "max_steps": 2})
    trainer.train()
    if resumed:
        calls = 0
        path = str(tmp_path / "checkpoint-2")
    else:
        (tmp_path / "checkpoint-2" / "model.safetensors").write_bytes(b"")  # of another run, in the same folder
        calls, path = teacher.calls, None
    settings = {**FOUR_STEPS, "save_audits": False}
    again = make_trainer(tmp_path, tiny_model_dir, teacher=Remote(fail_at=calls), **settings)
    saves, save = [], again._save_optimizer_and_scheduler
    monkeypatch.setattr(again, "_save_optimizer_and_scheduler", lambda path: (saves.append(path), save(path)))
    with pytest.raises(TeacherError, match="Stopped at step 2"):
        again.train(resume_from_checkpoint=path)
    assert len(saves) == (0 if resumed else 1)
    assert (tmp_path / "checkpoint-2" / "model.safetensors").stat().st_size > 0


@pytest.mark.usefixtures("first")
def test_limits_may_change_between_runs(tmp_path, tiny_model_dir):
    """Other timeouts or another log interval do not invalidate what was paid for."""
    changed = {"teacher_timeout": 7.0, "teacher_max_seconds": 9.0, "logging_steps": 3, "max_failed_chunks": 0.5}
    again = make_trainer(tmp_path, tiny_model_dir, teacher=Here.silent(), **{**FOUR_STEPS, **changed})
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.state.global_step == 4


def test_another_number_of_processes_asks_again_and_says_so(tmp_path, tiny_model_dir, caplog):
    """Prompts are shared out in another way, so nothing can be replayed."""
    logging.enable_propagation()
    path = journal_path(tmp_path, 0)
    Journal(path, run="r", teacher="t", fingerprint="f", rank=0, num_processes=2).close()
    trainer = make_trainer(tmp_path, tiny_model_dir, teacher=Here())
    trainer.train(resume_from_checkpoint=True)
    assert "Resume with 2 to replay it" in caplog.text
    assert "asked again" in caplog.text
    assert trainer.teacher_usage.completion_tokens > 0


def test_a_damaged_journal_stops_the_run_before_anything_is_asked(tmp_path, tiny_model_dir):
    """Never a silent loss: the message names the file."""
    path = journal_path(tmp_path, 0)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"not a journal" * 1000)
    trainer = make_trainer(tmp_path, tiny_model_dir, teacher=Here.silent())
    with pytest.raises(JournalError, match=r"rank-0\.sqlite"):
        trainer.train()


def test_two_runs_cannot_share_a_folder(tmp_path, tiny_model_dir):
    """The second one is refused at its start."""
    path = journal_path(tmp_path, 0)
    with Journal(path, run="r", teacher="t", fingerprint="f", rank=0, num_processes=1):
        trainer = make_trainer(tmp_path, tiny_model_dir, teacher=Here.silent())
        with pytest.raises(JournalError, match=r"rank-0\.sqlite"):
            trainer.train()


def test_without_save_audits_nothing_is_written(tmp_path, tiny_model_dir):
    """No folder, no file."""
    make_trainer(tmp_path, tiny_model_dir, teacher=Here(), save_audits=False).train()
    assert not (tmp_path / "_audits").exists()


@pytest.mark.case("U1")
def test_a_budget_that_is_used_up_saves_and_stops(tmp_path, tiny_model_dir, caplog):
    """A BudgetError of the teacher ends the run like any final error, and a resumed run replays what was paid."""

    class Poor(Here):
        async def sample(self, prefixes, request):
            if self.calls >= 11 and not hasattr(self, "is_rich"):
                raise BudgetError("The budget is used up.")
            return await super().sample(prefixes, request)

    poor = make_trainer(tmp_path, tiny_model_dir, teacher=Poor(), **FOUR_STEPS)
    with pytest.raises(TeacherError, match=r"Stopped at step 1: The budget is used up"):
        poor.train()
    rich = Poor()
    rich.is_rich = True
    trainer = make_trainer(tmp_path, tiny_model_dir, teacher=rich, **FOUR_STEPS)
    logging.enable_propagation()
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4
    assert re.findall(r"step (\d): \d of 8 audits from the journal", caplog.text) == ["1"]
    # At most six of the eight trajectories of a step have chunks; five audits of step 1 were there already.
    assert 2 * 5 < rich.calls <= 1 + 2 * 6


def test_a_full_disk(tmp_path, tiny_model_dir, monkeypatch):
    """When no checkpoint can be saved either, one line has both reasons, and this process does not wait for others."""
    trainer = make_trainer(tmp_path, tiny_model_dir, teacher=Here(fail_at=3))

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", full)
    with pytest.raises(
        TeacherError, match=r"step 0: the key was .*\. '.*checkpoint-0' cannot be saved \(.*No space"
    ) as caught:
        trainer.train()
    assert not caught.value.on_every_process


@pytest.mark.parametrize(
    ("error", "explained"),
    [
        (SafetensorError("I/O error: No space left on device (os error 28)"), True),
        (RuntimeError("[enforce fail at inline_container.cc:672] . PytorchStreamWriter failed writing file"), True),
        (RuntimeError("a bug"), False),
        (ConnectionError("of a tracker"), False),
    ],
)
def test_what_a_full_disk_raises(error, explained):
    """Errors of the disk become one line; others keep their traceback."""
    with pytest.raises(OmniOPDError if explained else type(error), match="cannot be saved" if explained else None):
        with recording.saving("out"):
            raise error


@pytest.mark.slow
def test_twenty_kills(tmp_path, tiny_model_dir):
    """kill -9 at 20 random moments: every run completes, the journal is intact, nothing journaled is asked again."""
    command = [
        sys.executable,
        str(ROOT / "tests" / "support" / "killed_runs.py"),
        str(tmp_path),
        str(tiny_model_dir),
        "20",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500)
    assert run.returncode == 0, run.stderr[-3000:]
    results = [json.loads(line) for line in run.stdout.splitlines() if line.startswith('{"kills"')]
    assert sum(result["kills"] for result in results) >= 20
    for result in results:
        assert result["asked_again"] == []
        assert result["journaled"] > 50
        # One audit of three chunks may be in flight for each trajectory of a step when a run is killed.
        assert result["requests"] - result["journaled"] <= 3 * 8 * result["kills"]
        # Each request used 7 tokens; one that was answered just before the kill may not have been counted.
        assert result["requests"] * 7 - result["ledger_tokens"] in range(0, 7 * 8 * result["kills"] + 1)
