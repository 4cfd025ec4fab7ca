# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E402 (the device that makes FSDP2 shard on a CPU comes before anything that makes a state)
"""Train three steps of two micro-batches under one back end, and count the bytes that a process holds and sends.

    python states_under.py BACK_END RESULT.json MODEL KIND

KIND is empty, `lora`, or `sync_each_batch`, which sends gradients after each micro-batch. The result holds, in bytes
of the first process:

- `student`: the peak of the student's weights, gradients and optimizer states between two micro-batches and before the
  update. All live tensors are counted, minus those that are not part of the student, since a list of what DeepSpeed
  keeps could be incomplete.
- `reference`: the weights of the reference.
- `copies`: copies of the student's weights in bf16 that are alive at the end of a forward.
- `gathered`, `gathered_reference`: weights that are gathered while a layer computes (FSDP2).
- `sent`: the bytes sent to the other processes in the last step, except for generation. DeepSpeed records the order of
  the parameters in the first step. Nothing else is counted in this step, since watching a tensor keeps it alive.
"""

import gc
import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from tests.support.back_ends import training_arguments

BACK_END, RESULT, MODEL, KIND = sys.argv[1:]
if BACK_END == "fsdp2":
    import tests.support.fsdp2_on_cpu  # noqa: F401

import torch
from datasets import Dataset
from peft import LoraConfig
from torch import nn
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import TrainerCallback

from omniopd_trl import OmniOPDConfig, OmniOPDTrainer
from omniopd_trl.teachers import ScriptedTeacher

# In bytes: what is smaller is a counter or a mask, and no weight.
SMALL = 256
NUM_STEPS = 3
# How often a ring sends what each operation is about.
SHARES = {
    **dict.fromkeys(("allreduce_", "all_reduce"), 2),
    **dict.fromkeys(("_allgather_base_", "allgather_", "all_gather_into_tensor"), 1),
    **dict.fromkeys(("_reduce_scatter_base_", "reduce_scatter_tensor", "broadcast_"), 1),
    **dict.fromkeys(("wait_tensor", "barrier"), 0),
}


def storages(tensors: Any) -> dict[int, int]:
    """Bytes of each storage of this process, by its address."""
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in local}


def everything() -> dict[int, int]:
    """Of all tensors that Python can reach."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor) and type(x).__name__ != "FakeTensor"]
    tensors += [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    return storages(tensor for tensor in tensors if tensor.device.type == "cpu")


def weights_of(model: nn.Module) -> dict[int, int]:
    """ZeRO-3 keeps a process's part beside a parameter that is empty."""
    return storages(getattr(parameter, "ds_tensor", parameter.data) for parameter in model.parameters())


def gathered(model: nn.Module) -> int:
    """Weights that are whole: FSDP2 puts plain tensors into the place of its own."""
    return sum(storages(p for p in model.parameters() if not isinstance(p, DTensor)).values())


class Copies(TorchDispatchMode):
    """Notes copies of parameters in another data type, which only autocast's cache may keep alive."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.parameters = set(storages(model.parameters()))
        self.made: list[tuple[StorageWeakRef, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].untyped_storage().data_ptr() in self.parameters:
            storage = result.untyped_storage()
            self.made.append((StorageWeakRef(storage), storage.nbytes()))
        return result

    def alive(self) -> int:
        return sum(size for storage, size in self.made if not storage.expired())


class Sent(TorchDispatchMode):
    """Adds up what a process sends: of S bytes `S (N - 1) / N`, and twice that where all get the sum of all."""

    def __init__(self):
        super().__init__()
        self.bytes = 0.0
        self.counts = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.counts and func.namespace in ("c10d", "_c10d_functional"):
            # One of the two sides holds all: the input of a reduce-scatter, the output of a gather.
            sides = [[t for t in tree_leaves(side) if isinstance(t, torch.Tensor)] for side in (result, *args[:2])]
            most = max(sum(tensor.nbytes for tensor in side) for side in sides)
            processes = torch.distributed.get_world_size()
            self.bytes += SHARES[func._opname] * most * (processes - 1) / processes
        return result


class Trainer(OmniOPDTrainer):
    """Keeps the most that was counted of each kind."""

    most: dict[str, int]
    parameters: int
    sent: Sent

    @property
    def is_last_step(self) -> bool:
        return self.state.global_step == NUM_STEPS - 1

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with self.sent if self.is_last_step else nullcontext():
            return super().training_step(*args, **kwargs)

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        self.sent.counts = False
        completions = super()._generate_single_turn(*args, **kwargs)
        self.sent.counts = True
        return completions

    def note(self, **sizes: int) -> None:
        for name, size in sizes.items():
            self.most[name] = max(self.most.get(name, 0), size)

    def observe(self) -> None:
        evaluate = self.objective.evaluate

        def count_copies(student: Any, *args: Any) -> torch.Tensor:
            with Copies(student) as copies:
                loss = evaluate(student, *args)
            self.note(copies=copies.alive())
            return loss

        self.objective.evaluate = count_copies

    def count(self) -> None:
        """Between forward and backward passes, when no activation is alive."""
        if self.is_last_step:
            return
        reference = {} if self.ref_model is None else weights_of(self.accelerator.unwrap_model(self.ref_model))
        whole = 4 * self.parameters
        # DeepSpeed's buffers have a size of their own, far beyond that of a tiny model.
        sizes = [size for key, size in everything().items() if key not in reference and SMALL <= size <= whole]
        buckets = 0
        if BACK_END == "ddp":  # which no Python object holds
            logged = self.model_wrapped._get_ddp_logging_data()
            buckets = sum(map(int, str(logged.get("rebuilt_bucket_sizes") or logged["bucket_sizes"]).split(", ")))
        self.note(student=sum(sizes) + buckets, reference=sum(reference.values()))


class Watch(TrainerCallback):
    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.count()


def main() -> None:
    settings: dict[str, Any] = {}
    if KIND == "sync_each_batch":
        settings["accelerator_config"] = {"gradient_accumulation_kwargs": {"sync_each_batch": True}}
    trainer = Trainer(
        model=MODEL,
        teacher_model=ScriptedTeacher(["some words"]),
        args=OmniOPDConfig(
            output_dir=str(Path(RESULT).parent / "out"),
            bf16=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            max_completion_length=16,
            num_chunks=1,
            chunk_length=8,
            num_rollouts=1,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=2,
            max_steps=NUM_STEPS,
            **settings,
            **training_arguments(BACK_END),
        ),
        train_dataset=Dataset.from_list([{"prompt": "some words"}] * 16),
        peft_config=LoraConfig(r=1, target_modules=["q_proj"]) if KIND == "lora" else None,
    )
    trainer.most, trainer.sent = {}, Sent()
    trainer.observe()
    student = trainer.accelerator.unwrap_model(trainer.model)
    trainer.parameters = sum(getattr(p, "ds_numel", p.numel()) for p in student.parameters())
    trainer.add_callback(Watch(trainer))

    def look(*_: Any) -> None:
        trainer.note(gathered=gathered(trainer.accelerator.unwrap_model(trainer.model_wrapped)))
        if trainer.ref_model is not None:
            trainer.note(gathered_reference=gathered(trainer.ref_model))

    if BACK_END == "fsdp2":
        for model in (student, trainer.ref_model):
            for module in model.modules():
                if type(module).__name__ == "Qwen3MLP":
                    module.register_forward_hook(look)

    update = torch.optim.AdamW.step

    def count_and_update(*args: Any, **kwargs: Any) -> Any:
        trainer.count()
        return update(*args, **kwargs)

    torch.optim.AdamW.step = count_and_update  # DeepSpeed calls it in the middle of its own
    trainer.train()
    if os.environ["RANK"] == "0":
        Path(RESULT).write_text(json.dumps({**trainer.most, "sent": round(trainer.sent.bytes)}))


if __name__ == "__main__":
    main()
