# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Requirements of jobs on larger machines: memory per GPU, time per step, and the throughput of the teacher.

    python -m benchmarks.scaling            # the tables of docs/scaling.md
    python -m benchmarks.scaling --check    # compare the formulas with the real models' code
    python -m benchmarks.scaling --states   # compare the formulas with counts of processes, by launch

The formulas are those of docs/scaling.md. The check runs the code of the real models, at their real sizes and 20,000
tokens, on tensors that have a shape and no memory (PyTorch's `FakeTensorMode`). It counts every live storage and every
multiplication, and needs neither a GPU nor its memory.

Memory and communication are counted in processes that train a tiny student (tests/distributed/states_under.py). There
are three processes: with two, a whole gradient in bf16 has as many bytes as half of a gradient in float32.
"""

import argparse
import json
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.shapes import model_of, tokenizer
from benchmarks.step_time import PROMPT_TOKENS
from omniopd_trl.accounting.hardware import (
    BACK_ENDS,
    GIB,
    GPUS,
    QWEN3,
    RESERVED,
    UTILIZATION,
    BackEnd,
    Shape,
    gathered,
    generation_seconds,
    last_layer_bytes,
    layer_bytes,
    lent,
    loss_bytes,
    moved_seconds,
    reference_bytes,
    sent_bytes,
    state_bytes,
    step_flops,
    student_bytes,
    teacher_servers,
    waiting_seconds,
    work_bytes,
)
from omniopd_trl.accounting.job import Job
from omniopd_trl.models import lm_head
from omniopd_trl.models.lm_head import LMHead, kl_to_reference, logprobs_of

TOKENS = 20_000  # one trajectory with its prompt: the paper's maximum
SEQUENCES = 16  # trajectories of one optimizer step; one per GPU if there are more GPUs
NUM_GPUS = (1, 8, 64)

GPU = GPUS["h100-80"]

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "gpu"  # what benchmarks/gpu.sh measured

# The method's defaults.
NUM_CHUNKS, CHUNK_LENGTH, NUM_ROLLOUTS, ROLLOUT_TOKENS = 10, 50, 10, 70

_BY_NAME = {back_end.name: back_end for back_end in BACK_ENDS}

# ---- Memory and time of the page's jobs ----


def gpu_bytes(student: Shape, back_end: BackEnd, gpus: int, tokens: int = TOKENS) -> float:
    """Peak bytes of one GPU that trains on one trajectory at a time."""
    states = state_bytes(student, back_end, gpus, accumulates=per_gpu(gpus) > 1)
    return states + work_bytes(student, back_end, tokens)


def runs(student: Shape, back_end: BackEnd, gpus: int) -> bool:
    """Whether there are enough GPUs with enough memory. 5% are reserved for the allocator."""
    return gpus >= back_end.min_gpus and gpu_bytes(student, back_end, gpus) < (1 - RESERVED) * GPU.memory


def training_seconds(student: Shape, gpus: int, adapters: bool = False) -> float:
    """Seconds of one optimizer step without generation."""
    return per_gpu(gpus) * step_flops(student, TOKENS, adapters) / (UTILIZATION * GPU.flops)


def per_gpu(gpus: int) -> float:
    """Trajectories that one GPU generates and trains on in a step."""
    return max(SEQUENCES, gpus) / gpus


def waits(student: Shape, back_end: BackEnd, gpus: int) -> float:
    """Seconds of communication in one optimizer step that do not overlap with computation."""
    training = training_seconds(student, gpus, back_end.adapters)
    moved = moved_seconds(student, back_end, GPU, gpus, per_gpu(gpus))
    return waiting_seconds(back_end, *moved, training, per_gpu(gpus))


def generated_seconds(student: Shape, gpus: int) -> float:
    """Seconds of generation in one optimizer step. Every GPU decodes its trajectories in one batch."""
    return generation_seconds(student, GPU, per_gpu(gpus), TOKENS)


def step_seconds(student: Shape, back_end: BackEnd, gpus: int) -> float:
    """Seconds of one optimizer step: generation, training and waiting."""
    training = training_seconds(student, gpus, back_end.adapters)
    return generated_seconds(student, gpus) + training + waits(student, back_end, gpus)


def teacher_tokens(gpus: int, seconds: float) -> tuple[float, float]:
    """Prompt and completion tokens per second that the teacher must deliver for steps of this duration."""
    chunks = max(SEQUENCES, gpus) * NUM_CHUNKS
    return chunks * TOKENS / 2 / seconds, chunks * NUM_ROLLOUTS * ROLLOUT_TOKENS / seconds


# ---- Tables ----


def memory_table() -> list[str]:
    """GiB per GPU. Bold if it does not fit."""
    rows = [
        f"| student | launch | {' | '.join(f'{n} GPU' + 's' * (n > 1) for n in NUM_GPUS)} |",
        "|---|---|" + "---|" * len(NUM_GPUS),
    ]
    for student in QWEN3:
        for back_end in BACK_ENDS:
            cells = []
            for gpus in NUM_GPUS:
                if gpus < back_end.min_gpus:
                    cells.append("")
                    continue
                size = f"{gpu_bytes(student, back_end, gpus) / GIB:.0f}"
                cells.append(size if runs(student, back_end, gpus) else f"**{size}**")
            rows.append(f"| {student.name} | {back_end.name} | {' | '.join(cells)} |")
    return rows


def time_table() -> list[str]:
    """Seconds per step, and the tokens per second that the fastest fitting launch needs from the teacher."""
    rows = [
        "| student | GPUs | generation | training | training, LoRA | fastest | teacher reads | writes | servers |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for student in QWEN3:
        for gpus in NUM_GPUS:
            fitting = [back_end for back_end in BACK_ENDS if runs(student, back_end, gpus)]
            if not fitting:
                rows.append(f"| {student.name} | {gpus} | no launch fits | | | | | | |")
                continue
            step = min(step_seconds(student, back_end, gpus) for back_end in fitting)
            parts = [generated_seconds(student, gpus)]
            parts += [training_seconds(student, gpus, adapters) for adapters in (False, True)]
            reads, writes = teacher_tokens(gpus, step)
            cells = [student.name, str(gpus), *(f"{p:.0f}" for p in parts), f"{step:.0f}"]
            cells += [f"{reads:,.0f}", f"{writes:,.0f}", f"{teacher_servers(reads, writes):.1f}"]
            rows.append(f"| {' | '.join(cells)} |")
    return rows


def step_table() -> list[str]:
    """Seconds per step of each launch: transfers, the waiting part of them, and the step. Blank if it does not run."""
    columns = [f"{n} GPU{'s' * (n > 1)}: moves | waits | step" for n in NUM_GPUS]
    rows = [f"| student | launch | {' | '.join(columns)} |", "|---|---|" + "---|" * 3 * len(NUM_GPUS)]
    for student in QWEN3:
        for back_end in BACK_ENDS:
            cells = []
            for gpus in NUM_GPUS:
                if not runs(student, back_end, gpus):
                    cells += [""] * 3
                    continue
                moves = sum(moved_seconds(student, back_end, GPU, gpus, per_gpu(gpus)))
                cells += [
                    f"{moves:.1f}",
                    f"{waits(student, back_end, gpus):.1f}",
                    f"{step_seconds(student, back_end, gpus):.0f}",
                ]
            if any(cells):
                rows.append(f"| {student.name} | {back_end.name} | {' | '.join(cells)} |")
    return rows


def gpu_table() -> list[str]:
    """The GPUs that `omniopd cost` knows."""
    rows = ["| name | GPU | memory, GB | bf16, TFLOP/s | bandwidth, GB/s | from |", "|---|---|---|---|---|---|"]
    for name, gpu in GPUS.items():
        numbers = [f"{gpu.memory / 1e9:.0f}", f"{gpu.flops / 1e12:.0f}", f"{gpu.bandwidth / 1e9:,.0f}"]
        rows.append(f"| `{name}` | {' | '.join([gpu.name, *numbers, gpu.source])} |")
    return rows


def measured_table() -> list[str]:
    """The measured steps of docs/results/gpu beside the formulas: peak memory, and seconds without generation."""
    rows = [
        "| GPU | student | tokens | memory: formula, GiB | measured | ratio | time: formula, s | measured | ratio |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    newest: dict[tuple[str, str, int], dict[str, Any]] = {}
    for path in sorted(RESULTS.glob("*/results.json")):
        for entry in json.loads(path.read_text(encoding="utf-8"))["parts"].get("fast", {}).values():
            for each in entry.get("measured", ()):
                if "peak_gib" in each:
                    newest[each["device"], each["shape"], each["tokens"]] = each
    for (device, name, tokens), each in sorted(newest.items()):
        gpu = next(gpu for gpu in GPUS.values() if gpu.name in device)
        student = next(shape for shape in QWEN3 if shape.name == name)
        job = Job(student, gpu, max_tokens=tokens + PROMPT_TOKENS, rows=each["rows"], half=True)
        # The method's part on the host is not counted by the formula.
        seconds = each["step"][0] - each["seconds"]["generation"][0]
        cells = [device.removeprefix("NVIDIA "), name, f"{tokens:,}"]
        for formula, measured, digits in (
            (job.training_bytes / GIB, each["peak_gib"][0], 1),
            (job.step(tokens + PROMPT_TOKENS).training, seconds, 2),
        ):
            cells += [f"{formula:.{digits}f}", f"{measured:.{digits}f}", f"{formula / measured:.2f}"]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


# ---- The checks ----


def traced(student: Shape, tokens: int = TOKENS, autocasts: bool = False, masked: bool = False) -> dict[str, float]:
    """Bytes and FLOPs of the student's code: a forward and backward with checkpointing and gradient accumulation.

    Weights are in bf16, or in float32 under autocast. `masked`: whether there is a mask for each pair of tokens, as
    for branches. It is not counted itself.

    Returns:
        `parameters`; `layers`, the peak bytes besides weights and gradients; `forward` and `backward`, in FLOPs.
    """
    aten = torch.ops.aten

    def causal(query: Any, key: Any, *rest: Any, **kwargs: Any) -> int:
        batch, heads, length, width = query
        return 4 * batch * heads * length * length * width // 2

    def causal_backward(grad: Any, query: Any, *rest: Any, **kwargs: Any) -> int:
        return causal(query, query) * 5 // 2  # it recomputes the scores

    attention = {
        aten._scaled_dot_product_flash_attention_for_cpu: causal,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: causal_backward,
    }

    cpu = torch.device("cpu")
    dtype = torch.float32 if autocasts else torch.bfloat16
    with FakeTensorMode():
        model = model_of(student, cpu, dtype).train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        ids = torch.zeros(1, tokens, dtype=torch.long)
        gradient = torch.zeros(1, tokens, student.hidden, dtype=dtype)
        # transformers cannot inspect the mask of a fake tensor, and would build one of `T * T`.
        pairs = torch.ones(1, 1, tokens, tokens, dtype=torch.bool) if masked else None
        mask = {"full_attention": pairs}

        def states() -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocasts):
                return model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state

        # Separate passes, since the FLOP counter keeps tensors alive.
        with FlopCounterMode(display=False, custom_mapping=attention) as counter:
            result = states()
            forward = counter.get_total_flops()
            result.backward(gradient)
            backward = counter.get_total_flops() - forward
        del result
        tracker = MemTracker()
        tracker.track_external(model)
        with tracker:
            states().backward(gradient)
    most = {str(kind).rsplit(".", 1)[-1]: size for kind, size in tracker.get_tracker_snapshot("peak")[cpu].items()}
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "layers": most["Total"] - most["PARAM"] - most["GRAD"],
        "forward": forward,
        "backward": backward,
    }


def traced_loss(student: Shape, back_end: BackEnd, tokens: int) -> float:
    """Peak bytes of chunk loss and anchor besides the heads, with the trainer's kernels as on a GPU.

    Triton processes a tile of logits in place. Fake tensors need no values, so these steps are replaced by no-ops: the
    PyTorch code that replaces Triton on a CPU would create temporaries.
    """
    cpu = torch.device("cpu")
    dtype = torch.float32 if back_end.autocasts else torch.bfloat16
    size = student.vocabulary, student.hidden
    in_place = {
        "logprob": ("_forward_tile", "_backward_tile", "_addmm_fp32"),
        "divergence": ("_stats_tile", "_backward_tile", "_addmm_fp32", "_project"),
    }
    with ExitStack() as stack:
        for module, names in in_place.items():
            for name in names:
                stack.enter_context(patch(f"trl.kernels.chunked_{module}.{name}", lambda *args, **kwargs: None))
        stack.enter_context(patch.object(lm_head, "TORCH_TOKENS", tokens))
        stack.enter_context(FakeTensorMode())
        targets, first = torch.zeros(tokens, dtype=torch.long), torch.arange(NUM_CHUNKS * CHUNK_LENGTH)
        rest = torch.arange(len(first), tokens)
        tracker = MemTracker()
        with tracker:
            weight, reference = torch.empty(size, dtype=dtype), torch.empty(size, dtype=dtype)
            # A head for each term: gradients of fake tensors are not added in place, unlike those on a GPU.
            trains = not back_end.adapters
            heads = [LMHead(weight.detach().requires_grad_(trains), None, 1.0, None) for _ in range(2)]
            hidden = torch.empty(tokens, student.hidden, dtype=dtype).requires_grad_()

            def loss() -> torch.Tensor:
                logprobs, _ = logprobs_of(hidden[first], heads[0], targets[first], 1.0)
                kept = LMHead(reference.clone() if back_end.clones else reference, None, 1.0, None)
                unaudited = torch.empty_like(hidden)[rest]  # the reference's states
                kl, _ = kl_to_reference(hidden[rest], heads[1], unaudited, kept, 1.0)
                return logprobs.sum() + kl.sum()

            with torch.autocast("cpu", torch.bfloat16):
                result = loss()
            result.backward()
    most = tracker.get_tracker_snapshot("peak")[cpu]["Total"]
    return float(most - 2 * student.head_parameters * dtype.itemsize)


def check(students: tuple[Shape, ...], tokens: int) -> list[tuple[str, str, float, float]]:
    """Rows of student, quantity, value of the formula, and value of the code."""
    rows = []
    for student in students:
        inputs = 2 * tokens * student.layers * student.hidden
        copies = 2 * student.layers * student.layer_weights + last_layer_bytes(student, tokens)
        code = traced(student, tokens) | {AUTOCAST: traced(student, tokens, autocasts=True)["layers"]}
        formulas = {
            "parameters": float(student.parameters),
            "layers": inputs + layer_bytes(student, tokens, autocasts=False),
            # With small weights the peak is a layer's backward. With large ones it is the end of the forward, with all
            # copies.
            AUTOCAST: 2 * inputs + max(layer_bytes(student, tokens, autocasts=True), copies),
            "forward": student.forward_flops(tokens),
            "backward": 3 * student.forward_flops(tokens),
        }
        for name in LOSSES:
            formulas[f"loss, {name}"] = loss_bytes(student, _BY_NAME[name], tokens)
            code[f"loss, {name}"] = traced_loss(student, _BY_NAME[name], tokens)
        rows += [(student.name, name, value, code[name]) for name, value in formulas.items()]
    return rows


AUTOCAST = "layers, autocast"
LOSSES = ("`single_gpu`, `multi_gpu`", "the same, LoRA", "`zero2`", "`fsdp2`")  # the others equal one of these

# Many small layers: ZeRO-2 keeps gradients whole that two processes share, and these must be a small part.
TINY = Shape("tiny", 96, 16, 192, 6, kv_heads=3, head_dim=16, vocabulary=384)
PROCESSES = 3

# FSDP2 with a gradient reduction in every micro-batch.
_SYNCS = replace(_BY_NAME["`fsdp2`"], waits=0, sends=(4 * 2 + 2, 0))
# For each launch: the tests' name of the back end, the variant, and the row of `BACK_ENDS`.
LAUNCHES = {
    "`multi_gpu`": ("ddp", "", _BY_NAME["`single_gpu`, `multi_gpu`"]),
    "`multi_gpu`, LoRA": ("ddp", "lora", _BY_NAME["the same, LoRA"]),
    "`zero2`": ("zero2", "", _BY_NAME["`zero2`"]),
    "`zero3`": ("zero3", "", _BY_NAME["`zero3`"]),
    "`fsdp2`": ("fsdp2", "", _BY_NAME["`fsdp2`"]),
    "`fsdp2`, `sync_each_batch`": ("fsdp2", "sync_each_batch", _SYNCS),
}
OFF_BY = 0.05  # bytes per parameter: uncounted norms and batches, adapters, padding of shards


def off_by(what: str, formula: float) -> float:
    """The tolerance between a count and its formula. For sent bytes, summed over passes, it is at least 5%."""
    return max(OFF_BY, formula / 20) if what == "sent" else OFF_BY


def states(name: str, folder: Path) -> list[tuple[str, float, float]]:
    """Rows of one launch: quantity, value of the formula, and count of the first process.

    Values are in bytes per parameter of the student. Quantities are those of `states_under`.
    """
    from tests.support.back_ends import SCRIPTS, run

    launch, kind, back_end = LAUNCHES[name]
    model_of(TINY, torch.device("cpu"), torch.float32).save_pretrained(folder / "model")
    tokenizer(TINY.vocabulary).save_pretrained(folder / "model")
    script, result = SCRIPTS / "states_under.py", folder / "result.json"
    counted = run(launch, script, result, str(folder / "model"), kind, num_processes=PROCESSES)
    formulas = {
        "student": student_bytes(TINY, back_end, PROCESSES, accumulates=True),
        "reference": reference_bytes(TINY, back_end, PROCESSES),
        "copies": back_end.copies * TINY.layers * TINY.layer_weights,
        "gathered": back_end.gathers / 2 * gathered(TINY),  # the other half is their gradients
        "gathered_reference": back_end.gathers_reference * lent(TINY),
        "sent": sent_bytes(TINY, back_end, PROCESSES, micro_batches=2),
    }
    return [(what, formulas[what] / TINY.parameters, counted[what] / TINY.parameters) for what in counted]


def check_states() -> int:
    """Print memory and sent bytes of each launch. Returns 1 if a formula is off."""
    print("| launch | | formula | counted |\n|---|---|---|---|")
    holds = True
    for name in LAUNCHES:
        with tempfile.TemporaryDirectory() as folder:
            for what, formula, counted in states(name, Path(folder)):
                print(f"| {name} | {what.replace('_', ' ')} | {formula:.2f} | {counted:.2f} |", flush=True)
                holds &= abs(formula - counted) <= off_by(what, formula)
    return int(not holds)


def main() -> int:
    """Print the tables, or compare the formulas. Returns 1 if one is off by more than 5% or `off_by`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="trace the real models' code (minutes)")
    parser.add_argument("--states", action="store_true", help="count in processes (minutes, needs DeepSpeed)")
    options = parser.parse_args()
    if options.states:
        return check_states()
    if not options.check:
        print(
            "\n".join([*memory_table(), "", *time_table(), "", *step_table(), "", *gpu_table(), "", *measured_table()])
        )
        return 0
    rows = check(QWEN3, TOKENS)
    print("| student | | formula | code | formula / code |\n|---|---|---|---|---|")
    units = {"parameters": (1e9, "billion"), "forward": (1e12, "TFLOP"), "backward": (1e12, "TFLOP")}
    for name, what, formula, code in rows:
        unit, text = units.get(what, (GIB, "GiB"))
        print(f"| {name} | {what}, {text} | {formula / unit:.2f} | {code / unit:.2f} | {formula / code:.3f} |")
    return int(any(abs(formula / code - 1) > 0.05 for *_, formula, code in rows))


if __name__ == "__main__":
    sys.exit(main())
