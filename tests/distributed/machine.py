# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""One of two machines that share no folder: a run, one that cannot be resumed, and one with a copied checkpoint.

    python machine.py FOLDER MODEL URL

FOLDER is the disk of this machine; that of the first one is `0` beside it. The results are written to
`FOLDER/result.json`.
"""

import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from omniopd_trl.errors import DataError
from tests.support.training import FOUR_MICRO_BATCHES, make_trainer, questions

FOLDER, MODEL, URL = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
FIRST = FOLDER.parent / "0"
SETTINGS: dict[str, Any] = {
    "teacher": "openai:gpt-6-luna",
    "teacher_base_url": URL,
    "teacher_timeout": 30.0,
    "max_steps": 2,
    "save_strategy": "steps",
    "save_steps": 1,
    "learning_rate": 0.05,
    "dataset": questions(32),
    **FOUR_MICRO_BATCHES,
}

said: list[str] = []


class Keep(logging.Handler):
    """Keeps the messages of this package's warnings."""

    def emit(self, record: logging.LogRecord) -> None:
        said.append(record.getMessage())


def trainer_in(name: str, **overrides: Any) -> Any:
    return make_trainer(FOLDER / name, MODEL, **{**SETTINGS, **overrides})


def total(model: torch.nn.Module) -> float:
    return sum(parameter.double().sum().item() for parameter in model.parameters())


def main() -> None:
    transformers_logging.enable_propagation()
    logging.getLogger("omniopd_trl").addHandler(Keep())
    results: dict[str, Any] = {}

    first = trainer_in("out", teacher_budget_tokens=10**6)
    first.train()
    results["first"] = [first.state.global_step, total(first.model), first.teacher_usage.completion_tokens]
    results["said at start"] = list(said)

    # Checkpoints are on the machine of process 0.
    again = trainer_in("out", teacher_budget_tokens=10**6)
    try:
        again.train(resume_from_checkpoint=True)
    except DataError as error:
        results["refused"] = str(error)
    shutil.rmtree(FOLDER / "out" / "checkpoint-2")
    if FIRST != FOLDER:
        shutil.copytree(FIRST / "out" / "checkpoint-1", FOLDER / "out" / "checkpoint-1", dirs_exist_ok=True)

    results["spent before"] = again.teacher.budget.tokens_spent
    results["limit"] = again.teacher.budget._token_limit
    said.clear()
    again.train(resume_from_checkpoint=True)
    results["again"] = [again.state.global_step, total(again.model), again.teacher_usage.completion_tokens]
    results["said"] = list(said)
    (FOLDER / "result.json").write_text(json.dumps(results))
    first.accelerator.end_training()


main()
