# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E402 (the device that makes FSDP2 shard on a CPU comes before anything that makes a state)
"""Train the demo's student with vLLM, on one process or several; each writes down what it saw.

    python student_run.py BACK_END MODEL FOLDER DTYPE full|lora '{"vllm_mode": "colocate", "seed": 0}'

Processes of their own, since vLLM sets up the one that it runs in for good. What process 1 saw is
`FOLDER/seen-1.json`. With `vllm_mode: server`, the server never gets the weights of step 3.
"""

import dataclasses
import functools
import json
import sys
from pathlib import Path

from tests.support.back_ends import training_arguments

BACK_END, MODEL, FOLDER, DTYPE, KIND, SETTINGS = sys.argv[1:]
if BACK_END == "fsdp2":
    import tests.support.fsdp2_on_cpu  # noqa: F401

import pytest
import torch
from datasets import concatenate_datasets
from peft import LoraConfig
from transformers import TrainerCallback
from trl.generation import vllm_generation

from tests.real_servers.folder_sync import FolderSync
from tests.real_servers.generations import make
from tests.real_servers.questions import dataset

MISSED = 3


class MissedUpdate(TrainerCallback):
    """Weights are not sent at one step, so there is a difference to measure."""

    def __init__(self, sync: FolderSync):
        self.sync = sync

    def on_step_end(self, args, state, control, **kwargs):
        self.sync.enabled = state.global_step != MISSED


def main() -> None:
    # TRL leaves these to vLLM. Here the engine is to differ from the trainer by its weights only.
    vllm_generation.LLM = functools.partial(
        vllm_generation.LLM, dtype=DTYPE, enforce_eager=True, block_size=32, disable_log_stats=True
    )
    settings = {**training_arguments(BACK_END), **json.loads(SETTINGS)}
    sync = None
    if settings["vllm_mode"] == "server":
        sync = FolderSync(pytest.MonkeyPatch(), Path(FOLDER))
        settings["callbacks"] = [MissedUpdate(sync)]
    if settings.pop("same_prompts", False):  # for two processes
        settings["train_dataset"] = concatenate_datasets([dataset(8)] * 2)
        settings["shuffle_dataset"] = False
    lora = LoraConfig(r=8, lora_alpha=32, target_modules="all-linear") if KIND == "lora" else None
    trainer = make(MODEL, FOLDER, peft_config=lora, **settings)
    frozen = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.train(trainer.args.resume_from_checkpoint)

    # Outside of training, weights change without a step.
    trained = trainer.copy()
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.25)
    trainer.evaluate()
    change = trainer.difference_to(trained).mean().item()
    parameters = dict(trainer.copy().named_parameters())
    seen = {
        "generations": [dataclasses.asdict(generation) for generation in trainer.generations],
        "log": trainer.state.log_history,
        "drift": max([(parameters[name] - value).abs().max().item() for name, value in frozen.items()], default=0.0),
        "change": change,
        "first": trainer.first,
        "branches": trainer.branches,
        "sent": sync.count if sync is not None else None,
        "teacher_tokens": trainer.teacher_usage.completion_tokens,
    }
    (Path(FOLDER) / f"seen-{trainer.accelerator.process_index}.json").write_text(json.dumps(seen))
    trainer.accelerator.wait_for_everyone()


if __name__ == "__main__":
    main()
