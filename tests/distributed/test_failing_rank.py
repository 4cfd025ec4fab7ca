# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""A teacher that fails on one process stops all processes, with one message and a checkpoint to resume from."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from omniopd_trl.cli.train import run
from tests.support.back_ends import SCRIPTS, finish, needs, start, training_arguments
from tests.support.training import questions

SCRIPT = SCRIPTS / "fail_under.py"
# From the launch to the end of both processes, imports included; a process that waits for a dead one waits for half an
# hour.
SECONDS = 120

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


# As torchrun does: what it starts has a session of its own, and keeps the pipe of what it says open.
LAUNCHER = """
import subprocess
started = subprocess.Popen(["sleep", "600"], start_new_session=True)
print(started.pid, flush=True)
started.wait()
"""


@pytest.fixture(scope="module")
def write_recipe(tiny_model_dir, tmp_path_factory):
    """A function that writes the recipe of a back end and returns its path."""
    data = tmp_path_factory.mktemp("data") / "train.jsonl"
    questions(32).to_json(data)

    def write(back_end: str, output_dir: Path, **settings) -> Path:
        recipe = {
            "model_name_or_path": str(tiny_model_dir),
            "teacher_model_name_or_path": "scripted",
            "dataset_name": str(data),
            "dataset_train_split": "train",
            "output_dir": str(output_dir),
            "report_to": "none",
            "bf16": False,
            "max_steps": 4,
            "save_strategy": "no",
            "logging_steps": 1,
            "disable_tqdm": True,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 4 if back_end == "one" else 2,
            "max_completion_length": 24,
            "num_chunks": 1,
            "chunk_length": 8,
            "min_chunk_length": 1,
            "num_rollouts": 2,
            "top_k": 1,
            "importance_sampling_correction": False,
            "learning_rate": 0.01,
            "adam_epsilon": 0.01,
            **training_arguments(back_end),
            **({"fsdp": "full_shard"} if back_end == "fsdp2" else {}),  # a recipe's is a string
            **settings,
        }
        path = output_dir.with_suffix(".json")
        path.write_text(json.dumps(recipe))
        return path

    return write


@pytest.fixture(scope="module")
def uninterrupted(write_recipe, tmp_path_factory) -> list[dict]:
    """The steps that one process takes without a failure."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "out"
    assert run(["--config", str(write_recipe("one", folder, save_strategy="steps", save_steps=4))]) == 0
    return steps(folder / "checkpoint-4")


def steps(checkpoint: Path) -> list[dict]:
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return [{key: entry[key] for key in ("loss", "grad_norm")} for entry in history if "grad_norm" in entry]


def launch(back_end: str, recipe: Path, kind: str, **environment: str) -> tuple[int, str, list[str]]:
    """Exit code and output of the launcher, and what the command returned on each process."""
    needs(back_end)
    folder = recipe.parent
    process = start(back_end, SCRIPT, folder, str(recipe), str(folder), kind, **environment)
    code, output = finish(process, SECONDS)
    return code, output, [path.read_text() for path in sorted(folder.glob(f"{kind}-?"))]


def files(checkpoint: Path) -> set[str]:
    """What a checkpoint consists of, whatever its step."""
    step = checkpoint.name.rpartition("-")[2]
    paths = (path.relative_to(checkpoint) for path in checkpoint.rglob("*") if path.is_file())
    return {str(path).replace(f"global_step{step}", "global_step") for path in paths}


def assert_continues(back_end: str, write_recipe, output_dir: Path, uninterrupted: list[dict]) -> None:
    """The checkpoint of the failed run is whole: the run resumes from it as if nothing had happened."""
    recipe = write_recipe(back_end, output_dir, resume_from_checkpoint=True, save_strategy="steps", save_steps=4)
    _, output, _ = launch(back_end, recipe, "nothing")
    assert (output_dir / "checkpoint-4").is_dir(), output[-5000:]
    assert files(output_dir / "checkpoint-2") == files(output_dir / "checkpoint-4")
    # The steps before the failure are those of the first run, which the checkpoint has kept.
    for here, there in zip(steps(output_dir / "checkpoint-4"), uninterrupted, strict=True):
        assert here == pytest.approx(there, rel=1e-4, abs=1e-5)


def test_processes_of_a_launcher_that_hangs_are_ended():
    """These tests' own limit of time: nobody else would end a process that waits for a dead one."""
    command = [sys.executable, "-c", LAUNCHER]
    launcher = subprocess.Popen(command, text=True, start_new_session=True, stdout=subprocess.PIPE)
    started = psutil.Process(int(launcher.stdout.readline()))
    with pytest.raises(AssertionError, match="not finished after 1 s"):
        finish(launcher, 1)
    assert not started.is_running() or started.status() == psutil.STATUS_ZOMBIE
    assert launcher.returncode == -signal.SIGKILL


@pytest.mark.parametrize("back_end", ["ddp", "zero3", "fsdp2"])
def test_a_final_error_on_one_rank(back_end, write_recipe, uninterrupted, tmp_path):
    """In the middle of a step: one message, both processes end by themselves, and the run resumes from there."""
    recipe = write_recipe(back_end, tmp_path / "out")
    code, output, codes = launch(back_end, recipe, "final")
    assert code != 0
    assert codes == ["1", "1"], output[-5000:]
    lines = [line for line in output.splitlines() if "key was refused" in line]
    assert len(lines) == 1, lines
    message = "TeacherError: Stopped at step 2: The key was refused. Set a valid one. A checkpoint is in "
    assert lines[0].startswith(message), lines
    assert "omniopd_trainer.py" not in output, "a traceback where one line says all"
    assert_continues(back_end, write_recipe, tmp_path / "out", uninterrupted)


# Under DDP the first process writes nearly all. Under ZeRO and FSDP2 both write, and what a checkpoint is taken for
# whole by is the first one's.
@pytest.mark.parametrize(("back_end", "slow"), [("ddp", "0"), ("zero2", "1"), ("fsdp2", "1")])
def test_a_mistake_in_the_teacher_on_one_rank(back_end, slow, write_recipe, uninterrupted, tmp_path):
    """An error of another kind: its traceback, once, and no process waits for the one that met it.

    None ends, either, before the slowest has written its part of the checkpoint: the launcher would end that one as
    well, and the run would continue from what is there.
    """
    recipe = write_recipe(back_end, tmp_path / "out")
    code, output, codes = launch(back_end, recipe, "unexpected", SLOW=slow)
    assert code != 0
    assert codes == ["1"], "the first process returns, the second raises"
    assert "TeacherError: Stopped at step 2: process 1 raised an unexpected RuntimeError (a mistake in the" in output
    assert output.count("RuntimeError: a mistake in the teacher") == 1
    # Written last, by the first process: a checkpoint with it is whole.
    written = {path.name: path.stat().st_mtime for path in (tmp_path / "out" / "checkpoint-2").iterdir()}
    assert written["trainer_state.json"] >= written[f"rng_state_{slow}.pth"]
    assert_continues(back_end, write_recipe, tmp_path / "out", uninterrupted)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("probe", "TeacherError: There is no key on this machine. Export one."),
        ("evaluation", "TeacherError: The account is empty. Top it up."),
    ],
)
def test_a_failure_on_one_rank_before_and_after_the_training(kind, message, write_recipe, tmp_path):
    """At the first question, and in the teacher's own evaluation: the other process does not continue and wait."""
    settings = {"max_steps": 1, "evaluate_teacher": True, "dataset_test_split": "train", "eval_strategy": "no"}
    code, output, codes = launch("ddp", write_recipe("ddp", tmp_path / "out", **settings), kind)
    assert code != 0
    assert codes == ["1", "1"], output[-5000:]
    assert [line for line in output.splitlines() if message[-12:] in line] == [message]
