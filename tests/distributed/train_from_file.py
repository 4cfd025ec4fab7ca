# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Train a recipe as `omniopd train` launches it, once for each kind of student, and write facts about the runs.

    FACTS=FOLDER python -m train_from_file --config RECIPE.yaml --output_dir OUT

replaces `python -m omniopd_trl.train`. Students are saved in `OUT/full` and `OUT/lora`, and facts in
`FOLDER/RANK.json`. Settings come from the recipe, and from the environment that accelerate's launcher sets.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

# What the launcher sets for a file with `distributed_type: FSDP`.
if os.environ.get("ACCELERATE_USE_FSDP") == "true":
    import tests.support.fsdp2_on_cpu  # noqa: F401

import torch
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import fsdp_utils
from torch import nn

from omniopd_trl.cli import train
from omniopd_trl.trainer import omniopd_trainer
from tests.support.back_ends import LOGGED, whole

# Both in one launch: most of the time goes into imports.
RUNS = {
    "full": [],
    "lora": [
        *("--use_peft", "--lora_r", "4", "--lora_alpha", "16", "--lora_dropout", "0"),
        *("--lora_target_modules", "all-linear"),
    ],
}
facts: dict[str, Any] = {}


class Trainer(omniopd_trainer.OmniOPDTrainer):
    """Notes what the launcher's settings made of the student."""

    def train(self, *args: Any, **kwargs: Any) -> Any:
        facts["sharded_while_loaded"] = any(p.numel() == 0 for p in self.model.parameters())
        facts["filled_from"] = None
        before = weights(self)
        result = super().train(*args, **kwargs)
        model = self.accelerator.unwrap_model(self.model_wrapped)
        student = model.get_base_model() if hasattr(model, "get_base_model") else model
        after = weights(self)
        facts.update(
            steps=[{key: entry[key] for key in LOGGED} for entry in self.state.log_history if "grad_norm" in entry],
            moved=max((after[name] - before[name]).abs().max().item() for name in after),
            held=share(model),
            tied=student.get_input_embeddings().weight is student.get_output_embeddings().weight,
            reference_held=None if self.ref_model is None else share(self.ref_model),
            zero_stage=self.model_wrapped.zero_optimization_stage() if self.is_deepspeed_enabled else None,
            distributed_type=str(self.accelerator.distributed_type.value),
            processes=self.accelerator.num_processes,
        )
        return result

    def end(self) -> None:
        """Leaves the processes together: another student follows."""


def share(model: nn.Module) -> float:
    """How much of a model this process keeps between uses, frozen weights included."""
    held = total = 0
    for parameter in model.parameters():
        total += getattr(parameter, "ds_numel", parameter.numel())
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        if hasattr(parameter, "ds_tensor") and parameter.numel() == 0:
            local = parameter.ds_tensor
        held += local.numel()
    return held / total


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The trainable weights, whole, by name."""
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    return {name: whole(parameter) for name, parameter in model.named_parameters() if parameter.requires_grad}


def filled(accelerator: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Stands before the function that hands out the first process's weights: are the others' really empty by then?"""
    facts["filled_from"] = sorted({p.device.type for p in model.parameters()})
    return fill(accelerator, model, *args, **kwargs)


def main() -> None:
    results = {}
    for name, options in RUNS.items():
        output_dir = str(Path(sys.argv[sys.argv.index("--output_dir") + 1]) / name)
        code = train.run([*sys.argv[1:], "--output_dir", output_dir, *options])
        if code:
            sys.exit(code)
        results[name] = dict(facts)
        facts.clear()
        # The next one is a run of its own.
        AcceleratorState._reset_state()
        GradientState._reset_state()
    path = Path(os.environ["FACTS"]) / f"{os.environ.get('RANK', '0')}.json"
    path.with_suffix(".partial").write_text(json.dumps(results))
    path.with_suffix(".partial").rename(path)
    train.wait_for_all()


if __name__ == "__main__":
    omniopd_trainer.OmniOPDTrainer = Trainer
    fill, fsdp_utils.fsdp2_load_full_state_dict = fsdp_utils.fsdp2_load_full_state_dict, filled
    main()
