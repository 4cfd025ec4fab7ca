# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Time of one step of OmniOPDTrainer by operator.

    python -m benchmarks.profile_step [--shape qwen3-1.7b] [--tokens 8192] [--results FILE]

The trainer is that of `benchmarks.step_time`, with replayed completions. The first two steps compile kernels and
allocate memory. The third step is profiled with torch's profiler. The ten kernels with the most time are printed for a
GPU, and the ten operators with the most self time for a CPU.
"""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback
from transformers.utils import logging

from benchmarks.results import add_result
from benchmarks.shapes import best_device
from benchmarks.step_time import BATCHES, Models, make_trainers

WARM_UP = 2
ROWS = 10


class ProfileLastStep(TrainerCallback):
    """Profiles the step after the warm-up."""

    def __init__(self, device: torch.device):
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self.profiler = profile(activities=activities)

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == WARM_UP:
            self.profiler.start()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == WARM_UP + 1:
            self.profiler.stop()


def rows_of(profiler: profile, device: torch.device) -> list[dict[str, Any]]:
    """The operators with the most self time on the device, in milliseconds."""
    on_device = device.type == "cuda"

    def own_time(event: Any) -> float:
        return (event.self_device_time_total if on_device else event.self_cpu_time_total) / 1000

    # On a GPU the self time of an operator is that of its kernels, which are listed separately.
    events = [e for e in profiler.key_averages() if not on_device or str(e.device_type).endswith("CUDA")]
    total = sum(own_time(event) for event in events)
    events.sort(key=own_time, reverse=True)
    return [
        {"name": event.key, "calls": event.count, "ms": own_time(event), "share": own_time(event) / total}
        for event in events[:ROWS]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--shape", choices=BATCHES, default="small")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--results", type=Path, help="a JSON file to which the results are added")
    options = parser.parse_args()
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    logging.set_verbosity_error()
    device, dtype = best_device()
    batch = BATCHES[options.shape]
    with tempfile.TemporaryDirectory() as folder:
        models = Models(batch.shape, device, dtype)
        trainer, _ = make_trainers(models, batch, options.tokens, WARM_UP + 1, True, Path(folder))
        callback = ProfileLastStep(device)
        trainer.add_callback(callback)
        trainer.train()
    rows = rows_of(callback.profiler, device)
    print(f"{batch.shape.name}, {options.tokens} tokens, {dtype}, {device.type}\n")
    print(f"{'ms':>10}{'share':>8}{'calls':>8}  operator or kernel")
    for row in rows:
        print(f"{row['ms']:10.2f}{row['share']:8.1%}{row['calls']:8}  {row['name'][:90]}")
    if options.results:
        where = {"shape": batch.shape.name, "tokens": options.tokens, "dtype": str(dtype), "device": device.type}
        add_result(options.results, {**where, "rows": rows})


if __name__ == "__main__":
    main()
