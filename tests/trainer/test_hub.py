# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Pushes reach the Hub whole and without anything else of the folder, and no failure of them costs a run."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig
from transformers import TrainerCallback

from omniopd_trl.errors import HubError
from omniopd_trl.teachers import ScriptedTeacher
from omniopd_trl.trainer import hub as pushes
from tests.support import hub_stub
from tests.support.training import make_trainer, script

LORA = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
MODEL = {"config.json", "generation_config.json", "model.safetensors", "training_args.bin", *TOKENIZER}
ADAPTER = {"adapter_config.json", "adapter_model.safetensors", "training_args.bin", *TOKENIZER}
# Of a checkpoint, besides the model.
STATE = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
SECRETS = {
    "OPENAI_API_KEY": "sk-a1b2c3d4e5f6g7h8",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMIK7MDENG",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef",
}


@pytest.fixture
def hub(monkeypatch):
    """A hub on this machine, to which this process is logged in."""
    with hub_stub.serve() as hub:
        hub_stub.connect(monkeypatch, hub)
        yield hub


def pushing(path, model, **overrides):
    """A trainer that saves, and pushes to me/student, after each of two steps."""
    settings = {"push_to_hub": True, "hub_model_id": "me/student", "save_strategy": "steps", "save_steps": 1}
    return make_trainer(path, model, **{**settings, "max_steps": 2, **overrides})


def on_disk(folder, names):
    return {name: (Path(folder) / name).read_bytes() for name in names}


def secret_bytes(content):
    """The secrets of this environment in what was sent."""
    return [name for name, value in {**SECRETS, "HF_TOKEN": hub_stub.TOKEN}.items() if value.encode() in content]


def download(repo, folder):
    for name, content in repo.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


@pytest.mark.parametrize(("peft_config", "model"), [(None, MODEL), (LORA, ADAPTER)], ids=["full", "adapter"])
def test_the_files_of_a_push(tmp_path, tiny_model_dir, hub, monkeypatch, peft_config, model):
    """The model and its card arrive byte for byte; nothing else of the folder does, and no secret."""
    hub_stub.connect(monkeypatch, hub, pipelined=peft_config is not None)
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    out = tmp_path / "out"
    text = "\n".join([*SECRETS.values(), hub_stub.TOKEN])
    others = (".env", "id_rsa", "service.json", "notes.txt", "audit.html", "completions/a.parquet", "old/_audits/a")
    for name in (*others, "old/model.safetensors", "old/config.json"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(text)
    trainer = pushing(out, tiny_model_dir, peft_config=peft_config, hub_token=hub_stub.TOKEN, hub_strategy="end")
    trainer.train()
    assert (out / "_audits").exists()
    assert hub.repos["me/student"].commits == []
    trainer.push_to_hub()
    files = hub.repos["me/student"].files
    assert set(files) == {*model, "README.md", "chunk_loss.png"}
    assert files == on_disk(out, files)
    assert not (out / pushes.PUSH_FOLDER / "2").exists()
    assert hub_stub.card_errors(files["README.md"].decode()) == []
    for content in [*hub.received, *files.values()]:
        assert not secret_bytes(content)
    for content in files.values():  # no text of the teacher, either
        assert b"Tom has" not in content
    assert trainer.args.hub_token == hub_stub.TOKEN
    assert torch.load(out / "training_args.bin", weights_only=False).hub_token is None


@pytest.mark.parametrize(
    ("strategy", "folders"),
    [
        ("every_save", {}),
        ("checkpoint", {"last-checkpoint": "checkpoint-2"}),
        ("all_checkpoints", {"checkpoint-1": "checkpoint-1", "checkpoint-2": "checkpoint-2"}),
    ],
)
def test_strategies(tmp_path, tiny_model_dir, hub, strategy, folders):
    """Each save pushes what `hub_strategy` says, in one commit, byte for byte."""
    # The checkpoint of an adapter has a card of PEFT, with a local path, which is not pushed.
    peft_config = LoraConfig(r=2, target_modules=["q_proj"]) if strategy == "checkpoint" else None
    model = MODEL if peft_config is None else ADAPTER
    trainer = pushing(tmp_path, tiny_model_dir, hub_strategy=strategy, hub_always_push=True, peft_config=peft_config)
    trainer.train()
    repo = hub.repos["me/student"]
    assert repo.commits == ["Training in progress, step 1", "Training in progress, step 2"]
    expected = {**on_disk(tmp_path / "checkpoint-2", model), **on_disk(tmp_path, ["README.md", "chunk_loss.png"])}
    for name, source in folders.items():
        for file, content in on_disk(tmp_path / source, model | STATE).items():
            expected[f"{name}/{file}"] = content
    assert repo.files == expected
    assert not (tmp_path / pushes.PUSH_FOLDER).exists()
    if strategy == "checkpoint":
        download(repo, tmp_path / "there")
        resumed = make_trainer(tmp_path / "new", tiny_model_dir, max_steps=3, peft_config=peft_config)
        resumed.train(resume_from_checkpoint=str(tmp_path / "there" / "last-checkpoint"))
        assert [entry["step"] for entry in resumed.state.log_history if "loss" in entry] == [1, 2, 3]


def test_branch_and_visibility(tmp_path, tiny_model_dir, hub):
    """A branch that does not exist is created at the start; a new repository is private when that is set."""
    trainer = pushing(tmp_path, tiny_model_dir, hub_revision="runs/a", hub_private_repo=True, max_steps=1)
    assert set(hub.repos["me/student"].branches) == {"main", "runs/a"}
    trainer.train()
    trainer.save_model()
    repo = hub.repos["me/student"]
    assert repo.private
    assert repo.files == {}
    assert repo.branches["runs/a"]["model.safetensors"] == (tmp_path / "model.safetensors").read_bytes()
    assert repo.commits == ["Training in progress, step 1", "Model save"]


def test_waiting_pushes_survive_the_rotation_of_checkpoints(tmp_path, tiny_model_dir, hub, monkeypatch):
    """Pushes that wait for a slow network send what was saved, even when the checkpoint is removed before."""
    monkeypatch.setattr(pushes, "_LINKED_BYTES", 0)
    trainer = pushing(tmp_path, tiny_model_dir, hub_always_push=True, save_total_limit=1, max_steps=3)
    weights = []

    class Release(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            weights.append((tmp_path / f"checkpoint-{state.global_step}/model.safetensors").read_bytes())

        def on_train_end(self, args, state, control, **kwargs):
            assert hub.repos["me/student"].commits == []
            assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
            hub.lock.release()

    trainer.add_callback(Release())
    hub.lock.acquire()
    trainer.train()
    repo = hub.repos["me/student"]
    assert repo.commits == [f"Training in progress, step {step}" for step in (1, 2, 3)]
    assert set(weights) <= set(hub.large_files.values())
    assert repo.files["model.safetensors"] == weights[-1]


def test_trackers_publish_nothing_unasked_and_stop_nothing(tmp_path, tiny_model_dir, hub, caplog):
    """A push publishes no table of Trackio by default; a tracker that fails costs neither the push nor the run."""

    class Tracker(TrainerCallback):
        def on_push_begin(self, args, state, control, **kwargs):
            assert args.trackio_static_space_id is False
            raise RuntimeError("the tracker's server is down")

    trainer = pushing(tmp_path, tiny_model_dir, max_steps=1)
    trainer.add_callback(Tracker())
    trainer.train()
    trainer.push_to_hub()
    assert hub.repos["me/student"].commits == ["Training in progress, step 1", "End of training"]
    assert caplog.text.count("the tracker's server is down") == 2
    assert (
        make_trainer(tmp_path, tiny_model_dir, trackio_static_space_id="me/x").args.trackio_static_space_id == "me/x"
    )


class Counting(ScriptedTeacher):
    """A teacher that counts the questions at the start."""

    asked = 0

    def probe(self, prompt):
        type(self).asked += 1


@pytest.mark.parametrize(
    ("settings", "fault", "words"),
    [
        ({}, 401, "HTTP 401 Unauthorized, Fault 401. Set the environment variable HF_TOKEN to a token with write"),
        ({}, 403, "HTTP 403 Forbidden, Fault 403. Set the environment variable HF_TOKEN"),
        ({}, 429, "HTTP 429 Too Many Requests"),
        ({}, 500, "HTTP 500 Internal Server Error, Fault 500. Fix the cause, or set push_to_hub=False"),
        ({}, None, "Server disconnected without sending a response. Fix the cause"),
        ({"hub_model_id": "a/b/c"}, 0, "as 'a/b/c': Repo id must be in the form"),
        ({"hub_private_repo": True}, 0, "me/student exists and is public"),
    ],
)
def test_a_hub_that_refuses_ends_the_run_before_it_begins(
    tmp_path, tiny_model_dir, hub, monkeypatch, settings, fault, words
):
    """One line says why and what to do, before the teacher is asked."""
    hub.repos["me/student"] = hub_stub.Repo()
    if fault != 0:
        hub.fail(fault)
    monkeypatch.setattr(Counting, "asked", 0)
    with pytest.raises(HubError) as caught:
        pushing(tmp_path / "out", tiny_model_dir, teacher=Counting(script), **settings)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not secret_bytes(str(caught.value).encode())
    assert Counting.asked == 0
    if fault == 401:
        hub.faults.clear()
        pushing(tmp_path / "out", tiny_model_dir, teacher=Counting(script))
        assert Counting.asked == 1


def test_offline(tmp_path, tiny_model_dir, hub, monkeypatch):
    """Offline mode is named, and nothing is tried again."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="unset the `HF_HUB_OFFLINE`"):
        pushing(tmp_path, tiny_model_dir)
    assert hub.received == []


@pytest.mark.parametrize(
    ("path", "fault"), [("/create", 429), ("/preupload", 500), ("/lfs/", None), ("/commit/", 500), ("/commit/", None)]
)
def test_a_transient_error_is_retried(tmp_path, tiny_model_dir, hub, caplog, path, fault):
    """At the start and during an upload, an error that passes leaves no trace but the time that it took."""
    hub.fail(fault, path, times=1)
    trainer = pushing(tmp_path, tiny_model_dir, max_steps=1)
    trainer.train()
    assert hub.repos["me/student"].commits == ["Training in progress, step 1"]
    assert "failed" not in caplog.text


@pytest.mark.parametrize(("fault", "reason"), [(401, "HF_TOKEN"), (429, "429"), (None, "disconnected")])
def test_a_failed_push_does_not_stop_the_training(tmp_path, tiny_model_dir, hub, caplog, fault, reason):
    """Each save warns in one line; the files of the last push stay, those of earlier ones do not pile up."""
    trainer = pushing(tmp_path, tiny_model_dir, hub_strategy="checkpoint")
    hub.fail(fault, "/commit/")
    trainer.train()
    assert trainer.state.global_step == 2
    warnings = [record.getMessage() for record in caplog.records if "on the Hub failed" in record.getMessage()]
    assert warnings
    assert all(
        reason in warning and "\n" not in warning and not secret_bytes(warning.encode()) for warning in warnings
    )
    (folder,) = (tmp_path / pushes.PUSH_FOLDER).iterdir()
    assert str(folder) in warnings[-1]
    assert on_disk(folder / "last-checkpoint", STATE) == on_disk(tmp_path / f"checkpoint-{folder.name}", STATE)


def test_a_failed_push_is_repeated_by_the_command_of_its_message(tmp_path, tiny_model_dir, hub, caplog):
    """A save warns, and an explicit push raises an error; the command in the message does what the push should."""
    trainer = pushing(tmp_path / "out dir", tiny_model_dir, hub_strategy="end")
    trainer.train()
    hub.fail(500, "/commit/")
    folder = tmp_path / "out dir" / pushes.PUSH_FOLDER / "2"
    trainer.save_model()
    assert [record.levelname for record in caplog.records if "on the Hub failed" in record.getMessage()] == ["WARNING"]
    with pytest.raises(HubError) as caught:
        trainer.push_to_hub()
    assert not secret_bytes(str(caught.value).encode())
    assert hub.repos["me/student"].files == {}
    command = shlex.split(re.search(r"repeat it with: (hf upload .*)", str(caught.value))[1])
    assert command == ["hf", "upload", "me/student", str(folder), "."]
    hub.faults.clear()
    program = Path(sys.executable).with_name("hf")
    process = subprocess.run(
        [program, *command[1:]], env={**os.environ, **hub.environment}, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    files = hub.repos["me/student"].files
    assert set(files) == {*MODEL, "README.md", "chunk_loss.png"}
    assert files == on_disk(tmp_path / "out dir", files)


def test_the_command_names_the_branch():
    """A push that is repeated goes to the branch of the first one, from a folder of any name."""
    push = pushes.Push(Path("my runs/_push/2"), "me/student", None, "runs/a", "hf_a1b2c3d4e5f6")
    error = str(push.failed(OSError("the disk is gone")))
    assert error.endswith("with: hf upload me/student 'my runs/_push/2' . --revision runs/a")
    assert "failed: the disk is gone." in error
    assert "hf_a1b2" not in error + repr(push)


def test_a_push_in_the_background_fails_aloud(tmp_path, tiny_model_dir, hub, caplog):
    """The future raises the error, and a warning says it to those who never look at the future."""
    trainer = pushing(tmp_path, tiny_model_dir, push_to_hub=False, save_strategy="no", max_steps=1)
    trainer.train()
    hub.fail(500, "/lfs/")
    with pytest.raises(HubError, match="HTTP 500"):
        trainer.push_to_hub(blocking=False).result(timeout=60)
    assert "repeat it with: hf upload me/student" in caplog.text
    hub.faults.clear()
    first = trainer.push_to_hub("First", blocking=False)  # the next one waits for it
    assert trainer.push_to_hub(blocking=False).result(timeout=60).commit_message == "End of training"
    assert first.result(timeout=60).commit_message == "First"


def test_a_push_is_skipped_while_another_is_sent(tmp_path, tiny_model_dir, hub):
    """Without `hub_always_push`, as in transformers; the files of the push that is sent stay."""
    trainer = pushing(tmp_path, tiny_model_dir)

    class Release(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            hub.lock.release()

    trainer.add_callback(Release())
    hub.lock.acquire()
    trainer.train()
    assert hub.repos["me/student"].commits == ["Training in progress, step 1"]
    trainer.push_to_hub()
    assert hub.repos["me/student"].commits[1:] == ["End of training"]


def test_files_that_cannot_be_collected(tmp_path, tiny_model_dir, hub, caplog):
    """A full disk, or a file in the way, costs the push, and neither the training nor the model."""
    (tmp_path / pushes.PUSH_FOLDER).write_text("in the way")
    trainer = pushing(tmp_path, tiny_model_dir, max_steps=1)
    trainer.train()
    assert "could not be collected" in caplog.text
    with pytest.raises(HubError, match="could not be collected"):
        trainer.push_to_hub()
    assert (tmp_path / "model.safetensors").exists()


def test_other_adapters_and_own_code(tmp_path, tiny_model_dir, tiny_tokenizer):
    """An adapter with a name is saved in a folder of that name; a model with its own code needs its modules."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    folder = tmp_path / "saved"
    for name in ("named/adapter_config.json", "named/adapter_model.safetensors", "other/adapter_config.json", "x.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")
    tiny_tokenizer.save_pretrained(folder)
    names = set(pushes._model_files(folder, model, tiny_tokenizer))
    assert names == TOKENIZER
    model.peft_config = {"named": LORA}
    model.config.auto_map = {"AutoModelForCausalLM": "x.Model"}
    added = set(pushes._model_files(folder, model, tiny_tokenizer)) - names
    assert added == {"named/adapter_config.json", "named/adapter_model.safetensors", "x.py"}
