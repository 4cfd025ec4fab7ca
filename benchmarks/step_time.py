# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Time of an optimizer step of OmniOPDTrainer compared with TRL's DistillationTrainer, part by part.

    python -m benchmarks.step_time [--shape small] [--tokens 512,2048] [--steps 3] [--generation real|replayed]
                                   [--results FILE]

Both trainers share the student, the optimizer, and a frozen model of the student's size. OmniOPDTrainer uses the
frozen model as reference, TRL as teacher. Both generate completions of the same forced length and take steps in turn
in one process. Medians are over the steps after the first. Time is wall time on a GPU and CPU time on a CPU, which
reduces the influence of other jobs. Both use default settings except for those in `settings`.

The teacher of OmniOPD answers immediately with texts of a chunk's length, so no time is spent waiting for it. TRL's
teacher is a forward pass inside the step, of the same size as that of our reference. The parts:

- generation: `_generate_single_turn`.
- scoring forward: the student without gradients, log-probabilities and entropies of all completion tokens.
- selection and scoring: every part of the method outside of the models: choosing chunks, decoding their texts, the
  (immediate) call of the teacher, cutting and encoding rollouts, similarities, posteriors, weights, the journal.
- reference or teacher forward: for OmniOPD, includes the log-probabilities of audited tokens.
- student forward and backward: includes the projections of both models for the loss, and their recomputation.
- optimizer: the update of the weights.
- other: padding, shuffling, metrics, logging, clipping.

`--generation replayed` takes random tokens instead of generating, for lengths at which generation with transformers
would dominate. The bounds for a whole step are not checked then. The bound for a step without generation is always
checked on a GPU.

On a GPU the command measures bfloat16 and also prints peak memory. A length that does not fit is reported, and the
others are measured. The time of each step is printed when it ends. `--results` adds the results to a JSON file. The
exit code is 1 if a bound is missed or a length does not fit.
"""

import argparse
import gc
import os
import statistics
import sys
import tempfile
import threading
import warnings
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
from transformers.utils import logging
from trl import DistillationConfig, DistillationTrainer

from benchmarks.results import add_result
from benchmarks.shapes import Limits, best_device, limits_of, model_of, now, tokenizer
from omniopd_trl import OmniOPDConfig, OmniOPDTrainer
from omniopd_trl.accounting.hardware import QWEN3, Shape
from omniopd_trl.teachers import ScriptedTeacher

STEP_BOUND, METHOD_BOUND = 1.15, 0.01
REST_BOUND = 1.2  # without generation, on a GPU: TRL's step costs about five forwards, ours one more
PROMPT_TOKENS = 64
PARTS = {
    "generation": "generation",
    "scoring": "scoring forward",
    "method": "selection and scoring",
    "reference": "reference or teacher forward",
    "student": "student forward and backward",
    "optimizer": "optimizer",
    "other": "other",
}


@dataclass(frozen=True)
class Batch:
    """A model and the batch sizes of its measurement."""

    shape: Shape
    lengths: tuple[int, ...]  # completion lengths, one run for each
    micro_batch: int
    micro_batches: int = 2

    @property
    def rows(self) -> int:
        """Number of trajectories of a step."""
        return self.micro_batch * self.micro_batches


SMALL = Shape("small", 256, 4, 768, 4, kv_heads=2, head_dim=64, vocabulary=32_768)
TINY = Shape("tiny", 32, 2, 64, 2, kv_heads=1, head_dim=16, vocabulary=2048)
BATCHES = {"tiny": Batch(TINY, (64,), micro_batch=1), "small": Batch(SMALL, (512, 2048), micro_batch=2)}
BATCHES |= {shape.name.lower(): Batch(shape, (2048, 8192, 20_000), 1, micro_batches=1) for shape in QWEN3[:2]}


class Clock:
    """Seconds by part. The time of a nested part is excluded from the outer one."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._since = 0.0

    def enter(self, part: str) -> None:
        self._turn_over()
        self._open.append(part)

    def leave(self) -> None:
        self._turn_over()
        self._open.pop()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self.enter(name)
        try:
            yield
        finally:
            self.leave()

    def _turn_over(self) -> None:
        time = now(self.device)
        if self._open:
            self.seconds[self._open[-1]] += time - self._since
        self._since = time


class Turns(TrainerCallback):
    """Lets two trainers in separate threads take steps in turn, and records the time of each step.

    Args:
        name: printed name of this trainer.
        own: semaphore, released when it is this trainer's turn.
        other: semaphore of the other trainer.
        both: barrier, passed when both trainers are prepared: preparation moves the state of the shared optimizer.
            Broken if a trainer fails.
        clock: the clock of this trainer.
    """

    def __init__(
        self, name: str, own: threading.Semaphore, other: threading.Semaphore, both: threading.Barrier, clock: Clock
    ):
        self.name, self.own, self.other, self.both, self.clock = name, own, other, both, clock
        self.steps: list[dict[str, float]] = []
        self.peaks: list[int] = []

    def on_train_begin(self, *args, **kwargs):
        self.both.wait()

    def on_step_begin(self, *args, **kwargs):
        self.own.acquire()
        if self.both.broken:
            raise threading.BrokenBarrierError
        gc.collect()  # objects of the other trainer's step
        if self.clock.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.clock.device)
        self.clock.seconds.clear()
        self.clock.enter("other")

    def on_pre_optimizer_step(self, *args, **kwargs):
        self.clock.enter("optimizer")

    def on_optimizer_step(self, *args, **kwargs):
        self.clock.leave()

    def on_step_end(self, *args, **kwargs):
        self.clock.leave()
        self.steps.append(dict(self.clock.seconds))
        if self.clock.device.type == "cuda":
            self.peaks.append(torch.cuda.max_memory_allocated(self.clock.device))
        print(f"{self.name}, step {len(self.steps)}: {sum(self.steps[-1].values()):.1f} s", flush=True)
        self.other.release()


class Timed:
    """The parts that are timed in both trainers."""

    clock: Clock
    replayed: torch.Tensor | None = None  # (rows, tokens)

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        with self.clock.part("generation"):
            if self.replayed is not None:
                return self.replayed[: len(prompt_ids)].tolist()
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)  # type: ignore[misc]

    def compute_loss(self, *args, **kwargs):
        with self.clock.part("student"):
            return super().compute_loss(*args, **kwargs)  # type: ignore[misc]


class Ours(Timed, OmniOPDTrainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._time(self.objective, "score", "scoring")
        self._time(self.objective, "run_reference", "reference")
        for method in ("trajectories", "record", "submit", "first_ready", "collect"):
            self._time(self.step_audits, method, "method")
        self._time(self.step_metrics, "add_audits", "method")

    def _time(self, owner: Any, method: str, part: str) -> None:
        original = getattr(owner, method)

        def timed(*args, **kwargs):
            with self.clock.part(part):
                return original(*args, **kwargs)

        setattr(owner, method, timed)


class Theirs(Timed, DistillationTrainer):
    def _get_last_hidden_state(self, unwrapped_model, *args, **kwargs):
        part = "student" if unwrapped_model is self.accelerator.unwrap_model(self.model) else "reference"
        with self.clock.part(part):
            return super()._get_last_hidden_state(unwrapped_model, *args, **kwargs)


def time_backward(trainer: Any) -> None:
    """Time the backward pass as part of the student's. The trainer has no method for it that could be overridden."""
    backward = trainer.accelerator.backward

    def timed(*args, **kwargs):
        with trainer.clock.part("student"):
            backward(*args, **kwargs)

    trainer.accelerator.backward = timed


def settings(batch: Batch, tokens: int, steps: int, device: torch.device, folder: Path) -> dict[str, Any]:
    """The settings of both trainers. All others have their defaults, which are equal."""
    return {
        "output_dir": str(folder),
        "use_cpu": device.type == "cpu",
        # The weights already have the measured data type.
        "bf16": False,
        "max_completion_length": tokens,
        # Prevents an early end of the completions.
        "generation_kwargs": {"min_new_tokens": tokens},
        "per_device_train_batch_size": batch.micro_batch,
        "gradient_accumulation_steps": batch.micro_batches,
        "max_steps": steps,
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1000,
    }


def prompts(words: PreTrainedTokenizerFast, count: int) -> Dataset:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(300, len(words), (count, 2 * PROMPT_TOKENS), generator=generator)
    # Decoded text may encode to other tokens, so it is encoded again and cut to the prompt length.
    texts = [words.decode(words(words.decode(row))["input_ids"][:PROMPT_TOKENS]) for row in ids]
    return Dataset.from_list([{"prompt": text} for text in texts])


class Models:
    """A student with random weights, its optimizer and its tokenizer, shared by all measured lengths."""

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype, attention: str | None = None):
        self.shape, self.device, self.dtype = shape, device, dtype
        self.words = tokenizer(shape.vocabulary)
        self.student = model_of(shape, device, dtype, attention)
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=1e-6, fused=device.type == "cuda")


def make_trainers(
    models: Models, batch: Batch, tokens: int, steps: int, replay: bool, folder: Path
) -> tuple[Ours, Theirs]:
    """Both trainers, with a shared student, frozen model and optimizer."""
    words, vocabulary = models.words, models.shape.vocabulary
    data = prompts(words, batch.rows * steps)
    generator = torch.Generator().manual_seed(2)
    replayed = torch.randint(300, vocabulary, (batch.rows, tokens), generator=generator) if replay else None
    texts = [words.decode(torch.randint(300, vocabulary, (50,), generator=generator)) for _ in range(10)]
    ours = Ours(
        models.student,
        ScriptedTeacher(texts),
        OmniOPDConfig(**settings(batch, tokens, steps, models.device, folder / "ours")),
        data,
        processing_class=words,
        optimizers=(models.optimizer, None),
    )
    theirs = Theirs(
        models.student,
        ours.ref_model,
        DistillationConfig(**settings(batch, tokens, steps, models.device, folder / "theirs")),
        data,
        processing_class=words,
        optimizers=(models.optimizer, None),
    )
    for trainer in (ours, theirs):
        trainer.remove_callback(PrinterCallback)  # only the table is printed
        trainer.replayed = replayed
        trainer.clock = Clock(models.device)
        time_backward(trainer)
    return ours, theirs


def take_steps_in_turn(
    ours: Timed, theirs: Timed, names: tuple[str, str] = ("OmniOPD", "TRL"), kind: type[Turns] = Turns
) -> tuple[Turns, Turns]:
    first, second, both = threading.Semaphore(1), threading.Semaphore(0), threading.Barrier(2)
    turns = (
        kind(names[0], first, second, both, ours.clock),
        kind(names[1], second, first, both, theirs.clock),
    )

    def train(trainer: Any, callback: Turns) -> None:
        trainer.add_callback(callback)
        try:
            trainer.train()
        except threading.BrokenBarrierError:
            pass  # the other trainer failed and raises the error
        except BaseException:
            both.abort()
            raise
        finally:
            callback.other.release()  # even after an error, the other trainer must not wait

    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(train, *pair) for pair in zip((ours, theirs), turns, strict=True)]:
            future.result()
    return turns


def seconds_at_the_limit(batch: Batch, tokens: int, itemsize: int, limits: Limits) -> dict[str, float]:
    """The minimum time of each part of our step on this device, by its compute or memory limit."""
    shape = batch.shape
    forward = batch.rows * shape.forward_flops(PROMPT_TOKENS + tokens)
    projection = batch.rows * shape.projection_flops(tokens)  # each completion token once
    cache = batch.rows * shape.cache_bytes(PROMPT_TOKENS + tokens / 2, itemsize)
    return {
        # Each decoding step reads all weights, and the keys and values of earlier tokens.
        "generation": tokens * (shape.parameters * itemsize + cache) / limits.bandwidth,
        "scoring": (forward + projection) / limits.flops,
        "reference": forward / limits.flops,
        # Projections of the loss: two in the forward, two recomputed in the backward, and two products for gradients.
        "student": (3 * forward + 6 * projection) / limits.flops,
        # Weights, gradients and two moments are read; weights and moments are written.
        "optimizer": 7 * shape.parameters * itemsize / limits.bandwidth,
    }


def report(models: Models, limits: Limits, batch: Batch, tokens: int, options: argparse.Namespace) -> bool:
    """Measure one length and print its table. Returns whether the bounds hold."""
    device, dtype = models.device, models.dtype
    replay = options.generation == "replayed"
    with tempfile.TemporaryDirectory() as folder:
        trainers = make_trainers(models, batch, tokens, options.steps + 1, replay, Path(folder))
        turns = take_steps_in_turn(*trainers)
    # The first step is a warm-up and allocates the optimizer's state.
    ours, theirs = (
        {part: statistics.median(step.get(part, 0.0) for step in turn.steps[1:]) for part in PARTS} for turn in turns
    )
    totals = [[sum(step.values()) for step in turn.steps[1:]] for turn in turns]
    whole = [statistics.median(total) for total in totals]
    ratio = statistics.median(a / b for a, b in zip(*totals, strict=True))
    rest = [
        [t - s.get("generation", 0.0) for t, s in zip(total, turn.steps[1:], strict=True)]
        for total, turn in zip(totals, turns, strict=True)
    ]
    rest_ratio = statistics.median(a / b for a, b in zip(*rest, strict=True))
    method = statistics.median(
        step["method"] / total for step, total in zip(turns[0].steps[1:], totals[0], strict=True)
    )
    least = seconds_at_the_limit(batch, tokens, dtype.itemsize, limits)

    audited = trainers[0].state.log_history[-1]["audit/audited_fraction"]
    shape = batch.shape
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread"
    print(f"{shape.name}: {shape.layers} layers of {shape.hidden}, {shape.vocabulary:,} tokens; {machine}, {dtype}")
    size = f"{batch.micro_batches} micro-batches of {batch.micro_batch}, {tokens} tokens each, {audited:.0%} audited"
    print(f"{size}; {options.steps} steps")
    print(f"limits, measured: {limits.flops / 1e12:.3g} TFLOP/s, {limits.bandwidth / 1e9:.4g} GB/s\n")
    unit = "seconds" if device.type == "cuda" else "CPU seconds"
    print(f"{unit:32}{'OmniOPD':>10}{'TRL':>10}{'of step':>10}{'limit':>10}{'of limit':>10}")
    for part, title in PARTS.items():
        row = f"{title:32}{ours[part]:10.3f}{theirs[part]:10.3f}{ours[part] / whole[0]:10.2%}"
        if part in least and not (part == "generation" and replay):
            row += f"{least[part]:10.3f}{least[part] / ours[part]:10.1%}"
        print(row)
    print(f"{'step':32}{whole[0]:10.3f}{whole[1]:10.3f}")
    print(f"{'tokens per second':32}{batch.rows * tokens / whole[0]:10.1f}{batch.rows * tokens / whole[1]:10.1f}")
    peaks = [max(turn.peaks[1:]) / 2**30 for turn in turns] if device.type == "cuda" else None
    if peaks is not None:
        print(f"{'peak memory, GiB':32}{peaks[0]:10.2f}{peaks[1]:10.2f}")
    print()
    print(f"{'step over TRL, without generation':50}{rest_ratio:8.3f}")
    holds = rest_ratio <= REST_BOUND or device.type != "cuda"
    if replay:
        print("generation was replayed: the bounds for a whole step are not checked\n")
    else:
        print(f"{'step over TRL':50}{ratio:8.3f}   bound {STEP_BOUND}")
        print(f"{'selection and scoring, of a step':50}{method:8.3%}   bound {METHOD_BOUND:.0%}\n")
        holds = holds and ratio <= STEP_BOUND and method < METHOD_BOUND
    if options.results:
        measured = {
            "shape": shape.name,
            "tokens": tokens,
            "rows": batch.rows,
            "device": machine,
            "dtype": str(dtype),
            "steps": options.steps,
            "generation": options.generation,
            "seconds": {part: [ours[part], theirs[part]] for part in PARTS},
            "step": whole,
            "limit_seconds": least,
            "limits": {"flops": limits.flops, "bandwidth": limits.bandwidth},
            "peak_gib": peaks,
            "audited": audited,
            "method_share": method,
            "step_over_trl": None if replay else ratio,
            "rest_over_trl": rest_ratio,
            "bounds_hold": holds,
        }
        add_result(options.results, measured)
    return holds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--shape", choices=BATCHES, default="small")
    parser.add_argument("--tokens", help="lengths of completions, separated by commas")
    parser.add_argument("--steps", type=int, default=3, help="measured steps of each trainer, after one warm-up step")
    parser.add_argument("--generation", choices=("real", "replayed"), default="real")
    parser.add_argument("--results", type=Path, help="a JSON file to which the results are added")
    options = parser.parse_args()
    # With several visible GPUs, the trainers would split each batch over them.
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)  # from transformers, about names in TRL
    batch = BATCHES[options.shape]
    lengths = [int(n) for n in options.tokens.split(",")] if options.tokens else batch.lengths
    device, dtype = best_device()
    limits = limits_of(device, dtype)
    models = Models(batch.shape, device, dtype)
    holds = True
    for tokens in lengths:
        try:
            holds = report(models, limits, batch, tokens, options) and holds
        except torch.OutOfMemoryError as error:
            print(f"{batch.shape.name}, {tokens} tokens: does not fit. {error}\n", flush=True)
            holds = False
        gc.collect()  # the trainers of this length hold a reference model
        if device.type == "cuda":
            torch.cuda.empty_cache()
    sys.exit(0 if holds else 1)


if __name__ == "__main__":
    main()
