# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Time saved by overlapping audits with training, for a teacher that takes as long as the training.

    python -m benchmarks.overlap [--steps 3]

A student with random weights (about 9 million) trains on eight micro-batches of two trajectories. The first run has a
teacher that answers immediately, and measures the training. The other runs have a teacher that serves one trajectory
after the other and takes as long as the training for all of them: one run waits for it before the first micro-batch,
one overlaps. Ratios are from a single run.
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Sequence

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging

from omniopd_trl import OmniOPDConfig, OmniOPDTrainer
from omniopd_trl.teachers import Prefix, SamplingRequest, ScriptedTeacher, TeacherReply

MICRO_BATCHES, ROWS = 8, 2


class PacedTeacher(ScriptedTeacher):
    """Serves one trajectory after the other, each in `seconds`, like a saturated server."""

    def __init__(self, seconds: float, is_remote: bool):
        super().__init__()
        self.seconds = seconds
        self.is_remote = is_remote
        self._turn: asyncio.Lock | None = None

    async def sample(self, prefixes: Sequence[Prefix], request: SamplingRequest) -> list[TeacherReply]:
        self._turn = self._turn or asyncio.Lock()
        async with self._turn:
            await asyncio.sleep(self.seconds)
        return await super().sample(prefixes, request)


def tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate([*alphabet, "<pad>", "<eos>"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", padding_side="left")


def student(vocabulary: int) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "head_dim": 64}
    return Qwen3ForCausalLM(
        Qwen3Config(vocab_size=vocabulary, num_attention_heads=6, num_key_value_heads=2, eos_token_id=None, **sizes)
    )


def step_seconds(teacher: PacedTeacher, steps: int) -> tuple[float, float]:
    """Median seconds of a step without generation (until the end of the last micro-batch), and of generation."""
    words = tokenizer()
    rows = MICRO_BATCHES * ROWS
    data = Dataset.from_list(
        [{"prompt": f"{n}: " + "count the marbles in the bag. " * 8} for n in range(rows * steps)]
    )
    generation: list[float] = []
    began: list[float] = []

    class Timed(OmniOPDTrainer):
        def _generate_single_turn(self, *args, **kwargs):
            start = time.perf_counter()
            completions = super()._generate_single_turn(*args, **kwargs)
            began.append(time.perf_counter())
            generation.append(began[-1] - start)
            return completions

    ended: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        args = OmniOPDConfig(
            folder,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            max_completion_length=32,
            chunk_length=8,
            num_chunks=2,
            num_rollouts=2,
            per_device_train_batch_size=ROWS,
            gradient_accumulation_steps=MICRO_BATCHES,
            max_steps=steps,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_steps=1000,
            save_audits=False,
        )
        trainer = Timed(student(len(words)), teacher, args, data, processing_class=words)
        training_step = trainer.training_step

        def timed(*positional, **named):
            loss = training_step(*positional, **named)
            ended.append(time.perf_counter())
            return loss

        trainer.training_step = timed
        trainer.train()
    last = ended[MICRO_BATCHES - 1 :: MICRO_BATCHES]
    # The first step is a warm-up.
    seconds = [end - start for start, end in zip(began, last, strict=True)][1:]
    return statistics.median(seconds), statistics.median(generation[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=4)
    steps = parser.parse_args().steps
    logging.set_verbosity_error()
    training, generation = step_seconds(PacedTeacher(0.0, is_remote=True), steps)
    pace = training / (MICRO_BATCHES * ROWS)
    serial, _ = step_seconds(PacedTeacher(pace, is_remote=False), steps)
    overlapped, _ = step_seconds(PacedTeacher(pace, is_remote=True), steps)
    for name, value in {
        "generation_seconds (not in the others)": generation,
        "scoring_and_training_seconds": training,
        "serial_seconds": serial,
        "overlapped_seconds": overlapped,
        "overlapped_over_serial": overlapped / serial,
    }.items():
        print(f"{name:40} {value:8.3f}")


if __name__ == "__main__":
    main()
