# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""A run prints one readable line per logging step."""

import asyncio
import io
import logging
from types import SimpleNamespace

import pytest
from tqdm import tqdm

from omniopd_trl.accounting.budget import Budget
from omniopd_trl.teachers import Rollout, Teacher, TeacherReply
from omniopd_trl.trainer import progress, step_audits
from omniopd_trl.trainer.progress import RunPrinter, RunProgress, describe
from tests.support.training import make_trainer

STEP = {
    "loss": 0.1,
    "epoch": 0.6,
    "chunk_loss": 0.2512,
    "audit/posterior": 0.8,
    "audit/posterior_std": 0.2,
    "audit/num_chunks": 4.0,
    "kl/unaudited": 0.00312,
    "teacher/prompt_tokens": 12345.0,
    "teacher/completion_tokens": 678.0,
    "teacher/usd_total": 1.234,
    "teacher/usd_left": 8.766,
    "teacher/wait_seconds": 2.5,
}


@pytest.mark.parametrize(
    ("logs", "line"),
    [
        (
            STEP,
            "step 3 of 40 (epoch 0.6) | chunk loss 0.251 | posterior 0.800 ± 0.200 | KL 0.00312 | 4 chunks each | "
            "teacher read 12,345, wrote 678 | 1.23 dollars, 8.77 left | waited 2.5 s",
        ),
        ({"loss": 0.1, "kl/unaudited": 0.0}, "step 3 of 40 | KL 0"),  # a batch without chunks
        ({"loss": 0.1, "reward": 0.5, "kl": 0.0}, "step 3 of 40 | loss 0.1 | reward 0.500"),  # a baseline
        (
            {"eval_loss": 0.1, "eval_runtime": 3, "eval_pass@1": 0.414, "eval_completions/mean_length": 27.4},
            "evaluation at step 3 | pass@1 0.414 | 27 tokens",
        ),
        (
            {"eval_math_loss": 0.1, "eval_math_pass@1": 0.5, "eval_math_pass@1/format": 0.25, "eval_math_runtime": 3},
            "evaluation at step 3 | math pass@1 0.500 | math pass@1/format 0.250",
        ),
        ({"teacher/tokens_left": 1234.0}, "step 3 of 40 | 1,234 tokens left"),
        ({"train_runtime": 12.0, "train_loss": 0.1}, None),
    ],
)
def test_describe(logs, line):
    assert describe(logs, 3, 40) == line


def test_pass_at_1_stays_in_the_lines(capsys, caplog):
    """That of the last evaluation, of all its sets, also after a resume; all metrics are logged at the level info."""
    printer = RunPrinter()
    state = SimpleNamespace(is_world_process_zero=True, max_steps=40, global_step=3)
    state.log_history = [{"eval_pass@1": 0.25, "step": 2}, {"chunk_loss": 0.5, "step": 3}]
    printer.on_train_begin(None, state, None)
    with caplog.at_level(logging.INFO, logger="omniopd_trl"):
        printer.on_log(None, state, None, logs={"chunk_loss": 0.5, "grad_norm": 1.25})
    state.global_step = 4
    printer.on_log(None, state, None, logs={"eval_a_pass@1": 0.5})
    printer.on_log(None, state, None, logs={"eval_b_pass@1": 0.75})
    printer.on_log(None, state, None, logs={"chunk_loss": 0.4})
    assert capsys.readouterr().out.splitlines() == [
        "step 3 of 40 | pass@1 0.250 at step 2 | chunk loss 0.5",
        "evaluation at step 4 | a pass@1 0.500",
        "evaluation at step 4 | b pass@1 0.750",
        "step 4 of 40 | a pass@1 0.500, b pass@1 0.750 at step 4 | chunk loss 0.4",
    ]
    assert "'grad_norm': 1.25" in caplog.text


def test_requests_in_flight_at_a_bounded_rate(monkeypatch):
    """One refresh per interval, which is longer in a file; none in a process without a bar."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    callback, file = RunProgress(), io.StringIO()
    callback.show_in_flight(1)
    callback.training_bar = tqdm(total=2, file=file, mininterval=0)
    for seconds, is_terminal, shown in ((0.5, True, False), (0.6, True, True), (30.0, False, False)):
        now[0] += seconds
        file.isatty = lambda is_terminal=is_terminal: is_terminal
        file.seek(0)
        file.truncate()
        callback.show_in_flight(12)
        assert ("12 requests in flight" in file.getvalue()) == shown
    callback.training_bar.close()


class SlowTeacher(Teacher):
    """Takes a moment, and counts its requests in flight."""

    name, is_remote = "slow", True

    def __init__(self):
        self.budget = Budget()

    async def sample(self, prefixes, request):
        async with self.budget.reserve(1, 1):
            await asyncio.sleep(0.05)
        return [TeacherReply((Rollout("x"),) * request.num_samples) for _ in prefixes]


@pytest.mark.parametrize("is_shown", [True, False])
def test_waiting(tmp_path, tiny_model_dir, monkeypatch, capsys, is_shown):
    """Training that waits for the teacher shows its requests on the bar, and nothing with `disable_tqdm`."""
    monkeypatch.setattr(step_audits, "WAIT_SECONDS", 0.01)
    monkeypatch.setattr(progress, "REFRESH_SECONDS_IN_FILE", 0.0)
    make_trainer(tmp_path, tiny_model_dir, teacher=SlowTeacher(), disable_tqdm=not is_shown).train()
    assert ("requests in flight" in capsys.readouterr().err) == is_shown
