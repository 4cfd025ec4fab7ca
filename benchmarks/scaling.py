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
"""What a job needs beyond the machines at hand: memory per GPU, time per step, and what its teacher must deliver.

    python -m benchmarks.scaling            # the tables of docs/scaling.md
    python -m benchmarks.scaling --check    # the formulas against the real models' code
    python -m benchmarks.scaling --states   # the formulas against what processes hold under DDP, ZeRO and FSDP2

The formulas are those of docs/scaling.md. The check runs the code of the real models, at their real sizes and 20,000
tokens, on tensors that have a shape and no memory (PyTorch's `FakeTensorMode`): it counts every storage that is alive
and every multiplication, and needs neither a GPU nor the memory of one.

The states are those of a tiny student that processes train on the CPU (tests/distributed/states_under.py). Three of
them: of two, each holds as many bytes of a whole gradient in bf16 as of its half in float32.
"""

import argparse
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.shapes import CARDS, QWEN3, Shape, tokenizer

GIB = 2**30
TOKENS = 20_000  # of one trajectory with its prompt: the paper's longest
SEQUENCES = 16  # trajectories of one optimizer step, or one per GPU where there are more GPUs
GPUS = (1, 8, 64)

# What is assumed of a GPU: an H100 with 80 GB, in bf16. Nothing here was measured on one.
GPU_MEMORY = 80e9  # bytes
GPU_FLOPS, GPU_BANDWIDTH = CARDS["NVIDIA H100 80GB HBM3"]  # dense, and bytes; per second
UTILIZATION = 0.4  # the share of GPU_FLOPS that training reaches
DECODE_EFFICIENCY = 0.5  # the share of GPU_BANDWIDTH that generation reaches
LINK = 50e9  # bytes per second and GPU between GPUs: 400 Gbit/s, which is less than NVLink

# A teacher of one's own: 32 billion parameters in bf16 on two such GPUs, 64 sequences at a time, and a prefix cache
# that serves four of five prompt tokens.
TEACHER_PARAMETERS, TEACHER_GPUS, TEACHER_SEQUENCES, TEACHER_CACHED = 32e9, 2, 64, 0.8

# The method's defaults.
NUM_CHUNKS, CHUNK_LENGTH, NUM_ROLLOUTS, ROLLOUT_TOKENS = 10, 50, 10, 70


# ---- Memory ----


@dataclass(frozen=True)
class BackEnd:
    """Bytes per parameter on one of N GPUs: `whole + split / N`, for the student and for the reference.

    Attributes:
        whole: what every GPU holds of each weight: the weight, its gradient, optimizer states.
        split: what the GPUs share.
        whole_reference: the same for the frozen reference.
        split_reference: the same.
        buckets: what several GPUs send of gradients, beside the gradients.
        waits: a whole gradient, from one micro-batch of a step to the next. As the last one's backward sends it layer
            by layer, 4 bytes of `split` take its place.
        gathers: of the head and one layer, which are whole for the moment they are used.
        copies: of the layers' weights, from their use to the end of a forward.
        gathers_reference: of the reference's embeddings, head and one layer, in its forward.
        lends: of the reference's embeddings, head and one layer, where it rests on the CPU.
    """

    name: str
    whole: float
    split: float
    whole_reference: float
    split_reference: float
    buckets: float = 0.0
    waits: float = 0.0
    gathers: float = 0.0
    copies: float = 0.0
    gathers_reference: float = 0.0
    lends: float = 0.0
    min_gpus: int = 1


# DDP and FSDP2 keep weights, gradients and Adam's two moments in float32, and compute in bf16: on copies that autocast
# makes of weights that are trained, and on what FSDP2 gathers. DeepSpeed has bf16 weights and gradients, and float32
# gradients, weights and moments of the part that a GPU updates. What is gathered is bf16, with its gradient.
BACK_ENDS = (
    BackEnd("`single_gpu`, `multi_gpu`", 4 + 4 + 8, 0, 4, 0, buckets=4, copies=2),
    BackEnd("the same, `ref_model_offload`", 4 + 4 + 8, 0, 0, 0, buckets=4, copies=2, lends=4),
    BackEnd("the same, LoRA", 4, 0, 0, 0),
    BackEnd("`zero2`", 2, 2 + 4 + 4 + 8, 2, 0, min_gpus=8),
    BackEnd("`zero2`, optimizer on the CPU", 2, 0, 2, 0),
    BackEnd("`zero3`", 0, 2 + 2 + 4 + 4 + 8, 0, 2, gathers=4, min_gpus=8),
    BackEnd("`zero3`, optimizer on the CPU", 0, 2, 0, 2, gathers=4, min_gpus=8),
    BackEnd("`fsdp2`", 0, 4 + 4 + 8, 0, 4, waits=2, gathers=4, gathers_reference=2, min_gpus=8),
)


def student_bytes(student: Shape, back_end: BackEnd, gpus: int, accumulates: bool) -> float:
    """Weights, gradients and optimizer states on one GPU. `accumulates`: a step has several micro-batches."""
    per_parameter = back_end.whole + back_end.split / gpus
    if gpus > 1:
        per_parameter += back_end.buckets
    if accumulates:
        per_parameter += max(0.0, back_end.waits - 4 / gpus)
    return per_parameter * student.parameters


def reference_bytes(student: Shape, back_end: BackEnd, gpus: int) -> float:
    """Of the reference's weights on one GPU."""
    return (back_end.whole_reference + back_end.split_reference / gpus) * student.parameters


def gathered(student: Shape) -> int:
    """Parameters of the head and one layer."""
    return student.head_parameters + student.layer_parameters


def lent(student: Shape) -> int:
    """Parameters of the embeddings, the head and one layer."""
    return student.parameters - (student.layers - 1) * student.layer_parameters


def state_bytes(student: Shape, back_end: BackEnd, gpus: int, accumulates: bool) -> float:
    """Weights, gradients, optimizer states and the reference on one GPU, with what is gathered of them."""
    states = student_bytes(student, back_end, gpus, accumulates) + reference_bytes(student, back_end, gpus)
    return states + back_end.gathers * gathered(student) + back_end.lends * lent(student)


def layer_bytes(student: Shape, tokens: int) -> float:
    """What one layer keeps while it is computed again and differentiated, in bf16.

    The coefficients are read off the code of Qwen3 in transformers, by the check below: how many results of each width
    a layer holds at its worst moment, its float32 norms counted as two.
    """
    queries, keys = student.heads * student.head_dim, student.kv_heads * student.head_dim
    return 2 * tokens * (10 * student.hidden + 7 * queries + 6 * student.intermediate + 33 * keys)


def loss_bytes(student: Shape, tokens: int) -> float:
    """Of chunk loss and anchor: the states of student and reference, of audited and other tokens, and their gradients;
    the head's gradient in float32, of either term until they are added; the two tiles of logits in float32, 4,096
    tokens by 32,768 of the vocabulary."""
    return 6 * 2 * tokens * student.hidden + 2 * 4 * student.head_parameters + 2 * 4 * 4096 * 32_768


def forward_bytes(student: Shape, back_end: BackEnd, tokens: int) -> float:
    """At the end of a forward: copies of weights, what is gathered of the reference, the states of both, two tiles."""
    weights = back_end.copies * student.layers * student.layer_weights
    weights += back_end.gathers_reference * lent(student)
    return weights + 2 * 2 * tokens * student.hidden + 2 * 4 * 4096 * 32_768


def work_bytes(student: Shape, back_end: BackEnd, tokens: int) -> float:
    """Of a forward and backward with gradient checkpointing: the layers' inputs, and the most that joins them."""
    inputs = 2 * tokens * student.layers * student.hidden
    layer, loss = layer_bytes(student, tokens), loss_bytes(student, tokens)
    return inputs + max(layer, loss, forward_bytes(student, back_end, tokens))


def gpu_bytes(student: Shape, back_end: BackEnd, gpus: int, tokens: int = TOKENS) -> float:
    """The most that one GPU holds while it trains on one trajectory at a time."""
    states = state_bytes(student, back_end, gpus, accumulates=per_gpu(gpus) > 1)
    return states + work_bytes(student, back_end, tokens)


# ---- Work ----


def step_flops(student: Shape, tokens: int = TOKENS) -> float:
    """All but generation, for one trajectory: scoring, the student's forward and backward, the reference.

    A backward is two forwards, and gradient checkpointing adds one: 1 + (1 + 1 + 2) + 1 forwards in all. Projections:
    once for the scores. For the loss, student and reference in the forward, both once more in the backward, which
    computes its tiles again, and two for the gradients.
    """
    return 6 * student.forward_flops(tokens) + (1 + 2 + 2 + 2) * student.projection_flops(tokens)


def training_seconds(student: Shape, gpus: int) -> float:
    """Of one optimizer step without generation."""
    return per_gpu(gpus) * step_flops(student) / (UTILIZATION * GPU_FLOPS)


def per_gpu(gpus: int) -> float:
    """Trajectories that one GPU generates and trains on in a step."""
    return max(SEQUENCES, gpus) / gpus


def generation_seconds(student: Shape, gpus: int) -> float:
    """Of one optimizer step: every GPU decodes its trajectories together, token by token.

    A token reads all weights once, and each trajectory's own keys and values so far.
    """
    weights = 2 * (student.parameters - (0 if student.tied else student.head_parameters))
    cache = per_gpu(gpus) * student.cache_bytes(TOKENS / 2, 2)
    return TOKENS * (weights + cache) / (DECODE_EFFICIENCY * GPU_BANDWIDTH)


def zero3_seconds(student: Shape, gpus: int) -> float:
    """What ZeRO-3 and FSDP2 send per optimizer step and GPU, as if nothing of it hid behind arithmetic.

    Each forward and backward gathers all weights in bf16: scoring, the student three times with checkpointing, and the
    reference; gradients are reduced once per micro-batch of one trajectory.
    """
    return per_gpu(gpus) * (5 + 1) * 2 * student.parameters * (gpus - 1) / gpus / LINK


def teacher_tokens(gpus: int, seconds: float) -> tuple[float, float]:
    """Prompt and completion tokens per second that keep a job busy whose steps take so long."""
    chunks = max(SEQUENCES, gpus) * NUM_CHUNKS
    return chunks * TOKENS / 2 / seconds, chunks * NUM_ROLLOUTS * ROLLOUT_TOKENS / seconds


def teacher_servers(reads: float, writes: float) -> float:
    """How many teachers of one's own deliver so many prompt and completion tokens per second."""
    decode = TEACHER_SEQUENCES * DECODE_EFFICIENCY * GPU_BANDWIDTH * TEACHER_GPUS / (2 * TEACHER_PARAMETERS)
    prefill = UTILIZATION * GPU_FLOPS * TEACHER_GPUS / (2 * TEACHER_PARAMETERS) / (1 - TEACHER_CACHED)
    return reads / prefill + writes / decode


# ---- Tables ----


def memory_table() -> list[str]:
    """GiB per GPU. Bold where it does not fit."""
    rows = [
        f"| student | launch | {' | '.join(f'{n} GPU' + 's' * (n > 1) for n in GPUS)} |",
        "|---|---|" + "---|" * len(GPUS),
    ]
    for student in QWEN3:
        for back_end in BACK_ENDS:
            cells = []
            for gpus in GPUS:
                if gpus < back_end.min_gpus:
                    cells.append("")
                    continue
                size = gpu_bytes(student, back_end, gpus)
                cells.append(f"{size / GIB:.0f}" if size < 0.95 * GPU_MEMORY else f"**{size / GIB:.0f}**")
            rows.append(f"| {student.name} | {back_end.name} | {' | '.join(cells)} |")
    return rows


def time_table() -> list[str]:
    """Seconds per step, and the tokens per second that the teacher has to deliver."""
    rows = [
        "| student | GPUs | generation | training | sent by `zero3` | step | teacher reads | writes | servers |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for student in QWEN3:
        for gpus in GPUS:
            parts = generation_seconds(student, gpus), training_seconds(student, gpus), zero3_seconds(student, gpus)
            step = sum(parts)
            reads, writes = teacher_tokens(gpus, step)
            cells = [student.name, str(gpus), *(f"{p:.0f}" for p in parts), f"{step:.0f}"]
            cells += [f"{reads:,.0f}", f"{writes:,.0f}", f"{teacher_servers(reads, writes):.1f}"]
            rows.append(f"| {' | '.join(cells)} |")
    return rows


# ---- The checks ----


def traced(student: Shape, tokens: int = TOKENS) -> dict[str, float]:
    """Bytes and FLOPs of the student's own code: a forward and backward with checkpointing that adds to gradients.

    Returns:
        `parameters`; `layers`, the most bytes besides weights and gradients; `forward` and `backward`, in FLOPs.
    """
    aten = torch.ops.aten

    def causal(query: Any, key: Any, *rest: Any, **kwargs: Any) -> int:
        batch, heads, length, width = query
        return 4 * batch * heads * length * length * width // 2

    def causal_backward(grad: Any, query: Any, *rest: Any, **kwargs: Any) -> int:
        return causal(query, query) * 5 // 2  # it computes the scores again

    attention = {
        aten._scaled_dot_product_flash_attention_for_cpu: causal,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: causal_backward,
    }

    cpu = torch.device("cpu")
    with FakeTensorMode():
        model = student.model(cpu, torch.bfloat16).train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        ids = torch.zeros(1, tokens, dtype=torch.long)
        gradient = torch.zeros(1, tokens, student.hidden, dtype=torch.bfloat16)

        def states() -> torch.Tensor:
            return model.base_model(input_ids=ids, use_cache=False).last_hidden_state

        # One after the other: counting keeps tensors alive.
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


def check(students: tuple[Shape, ...], tokens: int) -> list[tuple[str, str, float, float]]:
    """Student, quantity, by the formula, by the code."""
    rows = []
    for student in students:
        code = traced(student, tokens)
        formulas = {
            "parameters": float(student.parameters),
            "layers": 2 * tokens * student.layers * student.hidden + layer_bytes(student, tokens),
            "forward": student.forward_flops(tokens),
            "backward": 3 * student.forward_flops(tokens),
        }
        rows += [(student.name, name, value, code[name]) for name, value in formulas.items()]
    return rows


# Many small layers: ZeRO-2 keeps a gradient whole that two processes share, which has to weigh little here.
TINY = Shape("tiny", 96, 16, 192, 6, kv_heads=3, head_dim=16, vocabulary=384)
PROCESSES = 3

_BY_NAME = {back_end.name: back_end for back_end in BACK_ENDS}
# How the tests launch it, what differs, and the row above.
LAUNCHES = {
    "`multi_gpu`": ("ddp", "", _BY_NAME["`single_gpu`, `multi_gpu`"]),
    "`multi_gpu`, LoRA": ("ddp", "lora", _BY_NAME["the same, LoRA"]),
    "`zero2`": ("zero2", "", _BY_NAME["`zero2`"]),
    "`zero3`": ("zero3", "", _BY_NAME["`zero3`"]),
    "`fsdp2`": ("fsdp2", "", _BY_NAME["`fsdp2`"]),
    "`fsdp2`, `sync_each_batch`": ("fsdp2", "sync_each_batch", replace(_BY_NAME["`fsdp2`"], waits=0)),
}
OFF_BY = 0.05  # bytes per parameter: norms and batches that do not count, adapters, padding of shards


def states(name: str, folder: Path) -> list[tuple[str, float, float]]:
    """Of one launch: quantity, by the formula, as counted in the first process; bytes per parameter of the student."""
    from tests.distributed.back_ends import HERE, run

    launch, kind, back_end = LAUNCHES[name]
    TINY.model(torch.device("cpu"), torch.float32).save_pretrained(folder / "model")
    tokenizer(TINY.vocabulary).save_pretrained(folder / "model")
    script, result = HERE / "states_under.py", folder / "result.json"
    counted = run(launch, script, result, str(folder / "model"), kind, num_processes=PROCESSES)
    formulas = {
        "student": student_bytes(TINY, back_end, PROCESSES, accumulates=True),
        "reference": reference_bytes(TINY, back_end, PROCESSES),
        "copies": back_end.copies * TINY.layers * TINY.layer_weights,
        "gathered": back_end.gathers / 2 * gathered(TINY),  # the other half are their gradients
        "gathered_reference": back_end.gathers_reference * lent(TINY),
    }
    return [(what, formulas[what] / TINY.parameters, counted[what] / TINY.parameters) for what in counted]


def check_states() -> int:
    """Print what each launch holds; 1 when a formula is off."""
    print("| launch | | formula | counted |\n|---|---|---|---|")
    holds = True
    for name in LAUNCHES:
        with tempfile.TemporaryDirectory() as folder:
            for what, formula, counted in states(name, Path(folder)):
                print(f"| {name} | {what.replace('_', ' ')} | {formula:.2f} | {counted:.2f} |", flush=True)
                holds &= abs(formula - counted) <= OFF_BY
    return int(not holds)


def main() -> int:
    """Print the tables, or compare the formulas; 1 when one is off: by a twentieth of the code's, or by `OFF_BY`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="trace the real models' code (minutes)")
    parser.add_argument("--states", action="store_true", help="count what processes hold (minutes, needs DeepSpeed)")
    options = parser.parse_args()
    if options.states:
        return check_states()
    if not options.check:
        print("\n".join([*memory_table(), "", *time_table()]))
        return 0
    rows = check(QWEN3, TOKENS)
    print("| student | | formula | code | formula / code |\n|---|---|---|---|---|")
    units = {"parameters": (1e9, "billion"), "layers": (GIB, "GiB"), "forward": (1e12, "TFLOP")}
    for name, what, formula, code in rows:
        unit, text = units.get(what, units["forward"])
        print(f"| {name} | {what}, {text} | {formula / unit:.2f} | {code / unit:.2f} | {formula / code:.3f} |")
    return int(any(abs(formula / code - 1) > 0.05 for *_, formula, code in rows))


if __name__ == "__main__":
    sys.exit(main())
