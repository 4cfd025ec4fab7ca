# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Number of tokens that models process, padding included, for trajectories of very different lengths.

    python -m benchmarks.padding [--rows 32] [--micro-batch 2]

One step of OmniOPDTrainer and one of TRL's DistillationTrainer on the same completions, whose lengths are drawn from 1
to 512 with a long tail, median about 90. Tokens are counted at the input of the decoder. "naive" pads every row to the
longest prompt and the longest completion of the generation batch. "random" takes micro-batches of rows in random
order, each padded to its longest row. The model is tiny, since only counts matter. The exit code is 1 if
OmniOPDTrainer processes more than 1.1 times the real tokens.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback
from transformers.utils import logging
from trl import DistillationConfig, DistillationTrainer

from benchmarks.shapes import model_of, tokenizer
from omniopd_trl import OmniOPDConfig, OmniOPDTrainer
from omniopd_trl.accounting.hardware import Shape
from omniopd_trl.teachers import ScriptedTeacher

LONGEST, BOUND = 512, 1.1
TINY = Shape("tiny", 32, 1, 64, 2, kv_heads=1, head_dim=16, vocabulary=4096)


class Replayed:
    """Returns given completions instead of generating."""

    completions: list[list[int]]

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        return self.completions[: len(prompt_ids)]


class Ours(Replayed, OmniOPDTrainer):
    counts: dict[str, int]

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        score = self.objective.score

        def count_apart(model, part):
            before = self.counts["student"]
            scores = score(model, part)
            self.counts["scoring"] += self.counts["student"] - before
            self.counts["student"] = before
            return scores

        self.objective.score = count_apart


class Theirs(Replayed, DistillationTrainer):
    pass


def processed(trainer: Any, other: Any) -> tuple[dict[str, int], list[int], list[int]]:
    """Tokens that each model processes in one step, and the lengths of prompts and completions."""
    trainer.remove_callback(PrinterCallback)
    trainer.counts = counts = {"scoring": 0, "student": 0, "reference": 0}
    for name, model in (("student", trainer.model), ("reference", other)):

        def count(module, args, kwargs, name=name):
            counts[name] += kwargs["input_ids"].numel()

        model.model.register_forward_pre_hook(count, with_kwargs=True)
    trainer.train()
    batches = trainer._buffered_inputs
    lengths = [[n for b in batches for n in b[f"{key}_mask"].sum(1).tolist()] for key in ("prompt", "completion")]
    return counts, *lengths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=32, help="trajectories of the generation batch")
    parser.add_argument("--micro-batch", type=int, default=2)
    options = parser.parse_args()
    logging.set_verbosity_error()
    words = tokenizer(TINY.vocabulary)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.exp(4.5 + torch.randn(options.rows, generator=generator)).clamp(1, LONGEST).int().tolist()
    completions = [torch.randint(300, TINY.vocabulary, (n,), generator=generator).tolist() for n in drawn]
    data = Dataset.from_list([{"prompt": "some words " * (2 + n % 7)} for n in range(options.rows)])
    cpu = torch.device("cpu")
    results = []
    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = {
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,  # it would run the decoder again in the backward
            "max_completion_length": LONGEST,
            "per_device_train_batch_size": options.micro_batch,
            "gradient_accumulation_steps": options.rows // options.micro_batch,
            "max_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        }
        model = model_of(TINY, cpu, torch.float32)
        Replayed.completions = completions
        ours = Ours(
            model,
            ScriptedTeacher(),
            OmniOPDConfig(str(Path(folder) / "ours"), **settings),
            data,
            processing_class=words,
        )
        results.append(("OmniOPD", *processed(ours, ours.ref_model)))
        model, teacher = model_of(TINY, cpu, torch.float32), model_of(TINY, cpu, torch.float32)
        theirs = Theirs(
            model,
            teacher,
            DistillationConfig(str(Path(folder) / "theirs"), **settings),
            data,
            processing_class=words,
        )
        results.append(("TRL", *processed(theirs, teacher)))
    print(f"{options.rows} trajectories, micro-batches of {options.micro_batch}; tokens over real tokens\n")
    print(f"{'':12}{'real':>10}{'naive':>10}{'random':>10}{'scoring':>10}{'student':>10}{'reference':>12}")
    worst = 0.0
    for name, counts, prompts, lengths in results:
        real = sum(prompts) + sum(lengths)
        naive = len(lengths) * (max(prompts) + max(lengths)) / real
        rows = torch.tensor(prompts) + torch.tensor(lengths)
        size = options.micro_batch
        orders = [torch.randperm(len(rows), generator=generator) for _ in range(1000)]
        random = sum(size * rows[order].view(-1, size).amax(1).sum().item() for order in orders) / len(orders) / real
        shown = {key: f"{n / real:.3f}" if n else "-" for key, n in counts.items()}
        # The reference skips fully audited trajectories and may process fewer than the real tokens.
        print(
            f"{name:12}{real:10,}{naive:10.3f}{random:10.3f}{shown['scoring']:>10}{shown['student']:>10}{shown['reference']:>12}"
        )
        if name == "OmniOPD":
            worst = max(counts.values()) / real
    print(f"\n{'processed over real tokens, OmniOPD':40}{worst:8.3f}   bound {BOUND}")
    sys.exit(0 if worst <= BOUND else 1)


if __name__ == "__main__":
    main()
