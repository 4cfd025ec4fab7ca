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
"""Train the demo's student with vLLM in the same process, and write down what was seen.

    python colocated_run.py MODEL FOLDER DTYPE full|lora '{"seed": 0}'

A process of its own, since vLLM sets up the process that it runs in for good.
"""

import copy
import dataclasses
import functools
import json
import sys
from pathlib import Path

import torch
from generations import make
from peft import LoraConfig
from trl.generation import vllm_generation


def main(model: str, folder: str, dtype: str, kind: str, settings: str) -> None:
    # TRL leaves these to vLLM. Here the engine is to differ from the trainer by its weights only.
    vllm_generation.LLM = functools.partial(
        vllm_generation.LLM, dtype=dtype, enforce_eager=True, block_size=32, disable_log_stats=True
    )
    lora = LoraConfig(r=8, lora_alpha=32, target_modules="all-linear") if kind == "lora" else None
    trainer = make(model, folder, vllm_mode="colocate", peft_config=lora, **json.loads(settings))
    frozen = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.train(trainer.args.resume_from_checkpoint)

    # Outside of training, weights change without a step.
    trained = copy.deepcopy(trainer.model)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.1)
    trainer.evaluate()
    change = trainer.difference_to(trained).mean().item()
    parameters = dict(trainer.model.named_parameters())
    seen = {
        "generations": [dataclasses.asdict(generation) for generation in trainer.generations],
        "log": trainer.state.log_history,
        "drift": max([(parameters[name] - value).abs().max().item() for name, value in frozen.items()], default=0.0),
        "change": change,
        "first": trainer.first,
        "teacher_tokens": trainer.teacher_usage.completion_tokens,
    }
    (Path(folder) / "seen.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(*sys.argv[1:])
