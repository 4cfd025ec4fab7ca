# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E402 (the device that makes FSDP2 shard on a CPU comes before anything that makes a state)
"""Train two steps of baselines under one back end, with evaluations before and after, and write the results.

    python baselines_under.py BACK_END RESULT.json RUNS.json

RUNS.json is a list of `{"name", "method", "student"}`, each with optional arguments of `train` and settings of the
configuration. The weights are written to `NAME.safetensors` beside the result.
"""

import sys
from pathlib import Path
from typing import Any

BACK_END = sys.argv[1]
if BACK_END == "fsdp2":
    import tests.support.fsdp2_on_cpu  # noqa: F401

from peft import LoraConfig
from safetensors.torch import save_file
from torch.distributed.fsdp import FSDPModule

from omniopd_trl import OmniOPDConfig
from omniopd_trl.baselines.make import make_baseline
from tests.support.back_ends import train_each, training_arguments, whole
from tests.support.training import questions

SETTINGS: dict[str, Any] = {
    "max_completion_length": 12,
    "chunk_length": 8,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 2,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    # Adam divides by the root of the second moment, which would make full steps of rounding noise.
    "adam_epsilon": 1e-2,
    "max_grad_norm": 0.5,
    "bf16": False,
    "gradient_checkpointing": False,
    "logging_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "eval_on_start": True,
    "per_device_eval_batch_size": 2,
    "save_strategy": "no",
    "save_audits": False,
    "report_to": "none",
    "disable_tqdm": True,
}
NUM_PROMPTS, NUM_PROBLEMS = 16, 3


def by_text(completions: list[Any], **kwargs: Any) -> list[float]:
    """A reward that differs between random completions."""
    return [float(len(completion[0]["content"]) % 5) for completion in completions]


def train(
    folder: Path,
    name: str,
    method: str,
    student: str,
    section: dict[str, Any] | None = None,
    lora: bool = False,
    solutions: str | None = None,
    resume: str | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """With `resume`, from this checkpoint of another run, a path below `folder`."""
    trainer: Any = make_baseline(
        method,
        model=student,
        args=OmniOPDConfig(str(folder / name), **{**SETTINGS, **training_arguments(BACK_END), **settings}),
        train_dataset=questions(NUM_PROMPTS),
        eval_dataset=questions(NUM_PROBLEMS),
        section=section,
        solutions=solutions,
        reward_funcs=[by_text],
        peft_config=LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False) if lora else None,
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(folder / resume))
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    for module in model.modules():
        if isinstance(module, FSDPModule):  # its last forward has left weights gathered, and in bf16
            module.reshard()
    weights = {name: whole(p).float().cpu() for name, p in model.named_parameters() if p.requires_grad}
    again = trainer.evaluate()
    if trainer.accelerator.is_main_process:
        save_file({k: v.contiguous().clone() for k, v in weights.items()}, str(folder / f"{name}.safetensors"))
    times = ("runtime", "per_second", "time", "total_flos")  # ZeRO-3 has no parameters to count the last by
    logs = [
        {key: value for key, value in entry.items() if not any(part in key for part in times)}
        for entry in [*trainer.state.log_history, again]
    ]
    is_sharded = any(hasattr(p, "ds_id") or hasattr(p, "full_tensor") for p in model.parameters())
    return {"logs": logs, "sharded": is_sharded}


if __name__ == "__main__":
    train_each(train)
