# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Audits that run while earlier micro-batches train, and a teacher that fails: same result, no hang, nothing lost."""

import asyncio
import os
import subprocess
import sys
import time
from itertools import product

import pytest
import torch

from omniopd_trl.errors import TeacherError
from omniopd_trl.teachers import TeacherReply
from tests.support import ROOT
from tests.support.teachers import Here, Remote
from tests.support.training import FOUR_MICRO_BATCHES, make_trainer, questions, trainable


# Weights and normalizations that need the whole step leave nothing to overlap: each once.
@pytest.mark.parametrize(
    ("baseline", "normalization"),
    [
        *product(("none", "trajectory", "moving_average"), ("tokens", "sum")),
        *[("none", "components"), ("batch", "tokens"), ("shuffled", "sum"), ("constant", "components")],
    ],
)
def test_overlapped_equals_waiting_for_all(tmp_path, tiny_model_dir, baseline, normalization):
    """Two steps with audits that overlap end with the weights of a run that waits for every audit first."""
    runs = []
    for teacher in (Here(), Remote(delay=0.01)):
        trainer = make_trainer(
            tmp_path / type(teacher).__name__,
            tiny_model_dir,
            teacher=teacher,
            posterior_baseline=baseline,
            loss_normalization=normalization,
            max_steps=2,
            learning_rate=0.1,
            dataset=questions(16),
            **FOUR_MICRO_BATCHES,
        )
        trainer.train()
        runs.append(trainer)
    here, remote = runs
    assert not here.step_audits.overlap
    whole = baseline in ("batch", "shuffled", "constant")
    assert remote.step_audits.overlap == (not whole and normalization != "components")
    torch.testing.assert_close(trainable(remote.model), trainable(here.model), rtol=0, atol=1e-6)
    for first, second in zip(here.state.log_history[:2], remote.state.log_history[:2], strict=True):
        for name, value in first.items():
            if name not in ("step_time", "teacher/wait_seconds", "teacher/latency"):
                assert second[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
        assert second["teacher/requests"] == second["teacher/prompt_tokens"] / 5


def test_a_micro_batch_waits_for_its_own_audits_only(tmp_path, tiny_model_dir):
    """The micro-batches without the one slow trajectory that come before it are trained while it is in flight."""

    class OneSlow(Remote):
        async def sample(self, prefixes, request):
            if self.calls == 1:
                self.calls += 1
                await asyncio.sleep(4.0)  # longer than three micro-batches take on a busy machine
            return await super().sample(prefixes, request)

    teacher = OneSlow()
    trainer = make_trainer(tmp_path, tiny_model_dir, teacher=teacher, **FOUR_MICRO_BATCHES)
    trained: list[float] = []
    compute_loss = trainer.compute_loss

    def timed(*args, **kwargs):
        trained.append(time.perf_counter())
        return compute_loss(*args, **kwargs)

    trainer.compute_loss = timed
    trainer.train()
    assert len(trained) == 4
    early = sum(when < max(teacher.finished) for when in trained)
    assert early == 3, "a micro-batch without the slow trajectory waited for it"
    # What is left of the four seconds once the three are trained; their losses alone take a part of that time.
    left = max(teacher.finished) - trained[2]
    assert 0 < trainer.state.log_history[0]["teacher/wait_seconds"] <= left + 0.5


def test_a_final_error_saves_a_checkpoint_and_stops(tmp_path, tiny_model_dir):
    """The message names step, cause and next step; what was in flight is cancelled; the run can be resumed."""
    teacher = Remote(delay=0.02, fail_at=11)
    settings = {"max_steps": 3, "dataset": questions(24), "learning_rate": 0.05, **FOUR_MICRO_BATCHES}
    trainer = make_trainer(tmp_path / "run", tiny_model_dir, teacher=teacher, **settings)
    with pytest.raises(TeacherError, match=r"Stopped at step 1: the key was rejected.*resume from it"):
        trainer.train()
    assert (tmp_path / "run" / "checkpoint-1" / "trainer_state.json").exists()
    assert not _busy(trainer), "audits are still in flight"
    resumed = make_trainer(tmp_path / "run", tiny_model_dir, teacher=Remote(), **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 3


def _busy(trainer) -> bool:
    async def others() -> int:
        return len(asyncio.all_tasks()) - 1

    return trainer.step_audits.ask(others()) > 0


@pytest.mark.parametrize("teacher", [Remote, Here])
def test_too_many_dropped_chunks_stop_the_run(tmp_path, tiny_model_dir, teacher):
    """Above `max_failed_chunks`, with the ratio and a cause in the message; at 1.0 the run continues."""
    trainer = make_trainer(tmp_path / "a", tiny_model_dir, teacher=teacher(refuse=True), **FOUR_MICRO_BATCHES)
    with pytest.raises(TeacherError, match=r"(\d+) of \1 chunks .*max_failed_chunks=0.2.*refused"):
        trainer.train()
    lenient = make_trainer(
        tmp_path / "b", tiny_model_dir, teacher=teacher(refuse=True), max_failed_chunks=1.0, **FOUR_MICRO_BATCHES
    )
    lenient.train()
    assert lenient.state.global_step == 1


def test_chunks_below_min_rollouts_are_dropped(tmp_path, tiny_model_dir):
    """Two of three rollouts are enough for `min_rollouts=2`, and too few for 3."""

    class Two(Here):
        async def sample(self, prefixes, request):
            replies = await super().sample(prefixes, request)
            return [TeacherReply(reply.rollouts[:2], reply.usage, "one was lost") for reply in replies]

    enough = make_trainer(tmp_path / "2", tiny_model_dir, teacher=Two(), min_rollouts=2)
    enough.train()
    assert enough.state.log_history[0]["audit/dropped_chunks"] == 0
    few = make_trainer(tmp_path / "3", tiny_model_dir, teacher=Two(), min_rollouts=3, max_failed_chunks=1.0)
    few.train()
    assert few.state.log_history[0]["audit/dropped_chunks"] == 1


def test_a_mistake_in_a_teacher_saves_and_shows_its_traceback(tmp_path, tiny_model_dir):
    """An error that is no TeacherError is raised as it is, with a note that says where to continue from."""

    class Mistaken(Remote):
        async def sample(self, prefixes, request):
            if self.calls == 9:
                raise KeyError("choices")
            return await super().sample(prefixes, request)

    trainer = make_trainer(
        tmp_path, tiny_model_dir, teacher=Mistaken(), max_steps=3, dataset=questions(24), **FOUR_MICRO_BATCHES
    )
    with pytest.raises(KeyError, match="choices") as caught:
        trainer.train()
    assert "Stopped at step 1: process 0 raised an unexpected KeyError ('choices')" in caught.value.__notes__[0]
    assert (tmp_path / "checkpoint-1" / "trainer_state.json").exists()


RANKS = """
import sys
from pathlib import Path
from tests.support.training import make_trainer, questions
from tests.support.teachers import Remote
import os
rank = int(os.environ["RANK"])
teacher = Remote(delay=0.01, fail_at=5 if rank == 1 else None)
trainer = make_trainer(Path(sys.argv[1]), Path(sys.argv[2]), teacher=teacher, max_steps=3, dataset=questions(24),
    per_device_train_batch_size=1, gradient_accumulation_steps=4)
trainer.train()
"""


def test_a_failing_teacher_on_one_rank_ends_both(tmp_path, tiny_model_dir):
    """Neither rank waits for the other: both stop within seconds, with the failing rank's reason."""
    (tmp_path / "ranks.py").write_text(RANKS)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"),
        *("--rdzv_backend", "c10d", "--rdzv_endpoint", "127.0.0.1:0", "--redirects", "3"),
        *("--log_dir", str(tmp_path / "logs"), str(tmp_path / "ranks.py"), str(tmp_path / "out"), str(tiny_model_dir)),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    start = time.monotonic()
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode != 0
    assert time.monotonic() - start < 100
    logs = [path.read_text() for path in sorted((tmp_path / "logs").rglob("stderr.log"))]
    assert len(logs) == 2, run.stderr
    for log in logs:
        assert "Stopped at step 1: the key was rejected" in log, log[-2000:]
    assert (tmp_path / "out" / "checkpoint-1").exists()
