# Copyright 2026 The omniopd_trl Authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
# ruff: noqa: E402 (the device that makes FSDP2 shard on a CPU comes before anything that makes a state)
"""Trains the same three steps under one back end, for each kind of student, and writes down what came out.

    python train_under.py BACK_END RESULT.json MODELS.json

MODELS.json names what to train: a list of `{"name", "path", "lora", "teacher"}`, each with further settings of the
configuration. The weights are written beside the result, as `NAME.safetensors`.
"""

import json
import sys
from pathlib import Path
from typing import Any

from back_ends import training_arguments

BACK_END = sys.argv[1]
if BACK_END == "fsdp2":
    import fsdp2_on_cpu  # noqa: F401

import torch
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import gather_object
from peft import LoraConfig
from safetensors.torch import save_file
from trainer_utils import questions, script

from omniopd_trl import OmniOPDConfig, OmniOPDTrainer
from omniopd_trl.teachers import ScriptedTeacher

STEPS, PROMPTS = 3, 8


class Trainer(OmniOPDTrainer):
    """Cuts completions to lengths that depend on their prompts: the same for every back end."""

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> list[list[int]]:
        completions = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        if self.model.training:
            self.completions += completions
        lengths = (40, 31, 5, 17, 9, 36, 24, 1)
        return [
            ids if len(ids) <= lengths[sum(prompt) % 8] else [*ids[: lengths[sum(prompt) % 8] - 1], self.eos]
            for prompt, ids in zip(prompt_ids, completions, strict=True)
        ]

    @property
    def eos(self) -> int:
        return self._tokenizer.eos_token_id


def train(
    folder: Path, name: str, path: str, lora: bool, teacher: str | None = None, **settings: Any
) -> dict[str, Any]:
    num_processes = 1 if BACK_END == "one" else 2
    args = OmniOPDConfig(
        **{
            "output_dir": str(folder / name),
            "bf16": False,
            "report_to": "none",
            "save_strategy": "no",
            "gradient_checkpointing": False,
            "disable_tqdm": True,
            "max_completion_length": 40,
            "num_chunks": 2,
            "chunk_length": 10,
            "min_chunk_length": 6,
            "num_rollouts": 3,
            "beta": 0.5,
            # The likeliest token each time: what is sampled must not depend on the number of processes.
            "top_k": 1,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": PROMPTS // 2 // num_processes,
            "max_steps": STEPS,
            "logging_steps": 1,
            "learning_rate": 1e-2,
            # Adam divides by the root of the second moment: without this, rounding noise in gradients near zero would
            # become whole steps.
            "adam_epsilon": 1e-2,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.5,
            **training_arguments(BACK_END),
            **settings,
        }
    )
    trainer = Trainer(
        model=path,
        teacher_model=teacher or ScriptedTeacher(script),
        args=args,
        train_dataset=questions(PROMPTS * STEPS),
        peft_config=LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
        if lora
        else None,
    )
    trainer.completions = []
    before = weights(trainer)
    trainer.train()
    after = weights(trainer)
    if trainer.accelerator.is_main_process:
        save_file({k: v.contiguous().clone() for k, v in after.items()}, str(folder / f"{name}.safetensors"))
    logs = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    keys = ("loss", "grad_norm", "chunk_loss", "kl/unaudited", "kl/audited", "entropy", "audit/posterior")
    return {
        "steps": [{key: float(entry[key]) for key in keys} for entry in logs],
        "moved": max((after[key] - before[key]).abs().max().item() for key in after) if after else 0.0,
        "completions": sorted(map(str, gather_object(trainer.completions))),
        "sharded": sharded(trainer),
        "reference_is_a_copy": trainer.ref_model is not None,
        "reference_rests_on_cpu": rests_on_cpu(trainer),
    }


def weights(trainer: OmniOPDTrainer) -> dict[str, torch.Tensor]:
    """The trainable weights, whole, by the names that they have in one process."""
    whole = {}
    for name, parameter in trainer.accelerator.unwrap_model(trainer.model_wrapped).named_parameters():
        if not parameter.requires_grad:
            continue
        value = parameter.detach()
        if hasattr(parameter, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter]):
                value = parameter.detach().clone()
        elif hasattr(value, "full_tensor"):
            value = value.full_tensor()
        whole[name] = value.clone().float()
    return whole


def sharded(trainer: OmniOPDTrainer) -> bool:
    """Whether this process holds less than the whole student between uses."""
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    return any(hasattr(p, "full_tensor") or (hasattr(p, "ds_id") and p.numel() == 0) for p in model.parameters())


def rests_on_cpu(trainer: OmniOPDTrainer) -> bool:
    """Whether the reference is kept off the device between uses; ZeRO-3 does it by its own means."""
    if BACK_END.startswith("zero3") and trainer.ref_model is not None:
        return trainer.ref_model.zero_offload_param() is not None
    return trainer._offloaded_ref is not None


def main() -> None:
    result, models = Path(sys.argv[2]), json.loads(Path(sys.argv[3]).read_text())
    results = {}
    for model in models:
        torch.manual_seed(0)
        results[model["name"]] = train(result.parent, **model)
        # The next one is a run of its own.
        AcceleratorState._reset_state()
        GradientState._reset_state()
    if torch.distributed.is_initialized():
        rank = torch.distributed.get_rank()
        torch.distributed.barrier()
    else:
        rank = 0
    if rank == 0:
        partial = result.with_suffix(".partial")
        partial.write_text(json.dumps(results))
        partial.rename(result)


if __name__ == "__main__":
    main()
