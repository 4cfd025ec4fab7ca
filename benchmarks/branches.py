# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Time and memory of an optimizer step with branches, compared with a step without.

    python -m benchmarks.branches [--shape small] [--tokens 6340] [--branches 7] [--steps 2]
        [--attention sdpa | eager | flex_attention] [--results FILE]

Two trainers share the student and the optimizer, and take steps in turn in one process, on one trajectory of random
tokens with M = 10 chunks of C = 50 tokens. One has K branches at each chunk, which it samples with transformers; the
other has none. The student's weights are random, so nearly all branches differ: all forks are asked for, and M * K * C
tokens less those that branches share are added to the row.

Parts and times are those of `benchmarks.step_time`; "generation" is the sampling of the branches, since trajectories
are not generated. The peak of a step is what the step allocates beyond what was held before it: PyTorch's memory on a
GPU, the resident memory of the process on a CPU. Medians are over the steps after the warm-up: one step, and two with
FlexAttention, which needs a GPU and compiles kernels for the first length, and then for any.
"""

import argparse
import ctypes
import os
import statistics
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback
from transformers.utils import logging

from benchmarks.results import add_result
from benchmarks.shapes import best_device
from benchmarks.step_time import (
    BATCHES,
    PARTS,
    Batch,
    Clock,
    Models,
    Ours,
    Turns,
    prompts,
    settings,
    take_steps_in_turn,
    time_backward,
)
from omniopd_trl import OmniOPDConfig
from omniopd_trl.teachers import ScriptedTeacher

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident(name: str) -> int:
    """Resident memory of the process in bytes: `VmRSS` now, `VmHWM` at its peak."""
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


class Peaks(Turns):
    """Also measures how much memory a step takes beyond what was held before it."""

    def on_step_begin(self, *args, **kwargs):
        super().on_step_begin(*args, **kwargs)
        if self.clock.device.type == "cuda":
            self._before = torch.cuda.memory_allocated(self.clock.device)
        else:
            ctypes.CDLL(None).malloc_trim(0)  # return what the other trainer's step has freed
            RESET.write_text("5")  # the peak is now what is resident
            self._before = resident("VmRSS")

    def on_step_end(self, *args, **kwargs):
        if self.clock.device.type == "cpu":
            self.peaks.append(resident("VmHWM"))
        super().on_step_end(*args, **kwargs)
        self.peaks[-1] -= self._before


class Branched(Ours):
    """Replays trajectories, times the sampling of branches, and counts the tokens that these add to the row."""

    trajectories: torch.Tensor  # (rows, tokens)

    def _sample(self, prompt_ids, *args, purpose="generation", **kwargs):
        if purpose == "generation":
            return self.trajectories[: len(prompt_ids)].tolist(), None
        return super()._sample(prompt_ids, *args, purpose=purpose, **kwargs)

    def _sample_branches(self, *args, **kwargs):
        with self.clock.part("generation"):
            return super()._sample_branches(*args, **kwargs)

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.added = sum(len(suffix.token_ids) - 1 for row in inputs.get("suffixes", ()) for suffix in row)
        return super().compute_loss(model, inputs, *args, **kwargs)


def make_trainer(models: Models, batch: Batch, tokens: int, branches: int, steps: int, folder: Path) -> Branched:
    words, vocabulary = models.words, models.shape.vocabulary
    generator = torch.Generator().manual_seed(2)
    trajectories = torch.randint(300, vocabulary, (batch.rows, tokens), generator=generator)
    texts = [words.decode(torch.randint(300, vocabulary, (50,), generator=generator)) for _ in range(10)]
    # The length of completions is not forced: that of branches is the chunk's.
    own = {**settings(batch, tokens, steps, models.device, folder), "generation_kwargs": None}
    trainer = Branched(
        models.student,
        ScriptedTeacher(texts),
        OmniOPDConfig(num_branches=branches, **own),
        prompts(words, batch.rows * steps),
        processing_class=words,
        optimizers=(models.optimizer, None),
    )
    trainer.remove_callback(PrinterCallback)  # only the table is printed
    trainer.trajectories = trajectories
    trainer.clock = Clock(models.device)
    time_backward(trainer)
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--shape", choices=BATCHES, default="small")
    parser.add_argument("--tokens", type=int, default=6340, help="tokens of the trajectory")
    parser.add_argument("--branches", type=int, default=7, help="K")
    parser.add_argument("--steps", type=int, default=2, help="measured steps of each trainer, after the warm-up")
    parser.add_argument("--attention", choices=("sdpa", "eager", "flex_attention"), default="sdpa")
    parser.add_argument("--results", type=Path, help="a JSON file to which the results are added")
    options = parser.parse_args()
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)  # from transformers, about names in TRL
    batch = Batch(BATCHES[options.shape].shape, (options.tokens,), micro_batch=1, micro_batches=1)
    device, dtype = best_device()
    if options.attention == "flex_attention" and device.type == "cpu":
        parser.error("--attention flex_attention needs a GPU: PyTorch has no backward pass of it for a CPU.")
    models = Models(batch.shape, device, dtype, options.attention)
    warm_up = 2 if options.attention == "flex_attention" else 1  # the first step also allocates the optimizer's state
    with tempfile.TemporaryDirectory() as folder:
        trainers = [
            make_trainer(models, batch, options.tokens, k, options.steps + warm_up, Path(folder, str(k)))
            for k in (options.branches, 0)
        ]
        turns = take_steps_in_turn(*trainers, names=(f"K = {options.branches}", "K = 0"), kind=Peaks)
    measured = [turn.steps[warm_up:] for turn in turns]
    parts = [{p: statistics.median(step.get(p, 0.0) for step in steps) for p in PARTS} for steps in measured]
    whole = [statistics.median(sum(step.values()) for step in steps) for steps in measured]
    peaks = [statistics.median(turn.peaks[warm_up:]) / 2**20 for turn in turns]
    where: dict[str, Any] = {"shape": batch.shape.name, "tokens": options.tokens, "branches": options.branches}
    where["attention"] = options.attention
    where |= {"device": device.type, "dtype": str(dtype), "steps": options.steps, "added": trainers[0].added}
    print(", ".join(f"{name} {value}" for name, value in where.items()) + "\n")
    unit = "seconds" if device.type == "cuda" else "CPU seconds"
    print(f"{unit:32}{'with branches':>15}{'without':>12}")
    for part, title in PARTS.items():
        print(f"{title:32}{parts[0][part]:15.3f}{parts[1][part]:12.3f}")
    print(f"{'step':32}{whole[0]:15.3f}{whole[1]:12.3f}")
    print(f"{'peak memory of a step, MiB':32}{peaks[0]:15,.0f}{peaks[1]:12,.0f}\n")
    ratios = {"time_ratio": whole[0] / whole[1], "peak_ratio": peaks[0] / peaks[1]}
    print(f"{'time over K = 0':32}{ratios['time_ratio']:15.3f}")
    print(f"{'peak memory over K = 0':32}{ratios['peak_ratio']:15.3f}")
    if options.results:
        seconds = {part: [own[part] for own in parts] for part in PARTS}
        add_result(options.results, {**where, "seconds": seconds, "step": whole, "peak_mib": peaks, **ratios})


if __name__ == "__main__":
    main()
