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
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.shapes import QWEN3, Shape, tokenizer
from omniopd_trl.models import lm_head
from omniopd_trl.models.lm_head import LMHead, kl_to_reference, logprobs_of

GIB = 2**30
TOKENS = 20_000  # one trajectory with its prompt: the paper's maximum
SEQUENCES = 16  # trajectories of one optimizer step; one per GPU if there are more GPUs
GPUS = (1, 8, 64)

# Assumptions about a GPU: an H100 with 80 GB, in bf16. None of these values were measured.
GPU_MEMORY = 80e9  # bytes
# Data sheet of an H100 SXM: dense bf16 operations and bytes, per second.
GPU_FLOPS, GPU_BANDWIDTH = 989e12, 3.35e12
UTILIZATION = 0.4  # the share of GPU_FLOPS that training reaches
DECODE_EFFICIENCY = 0.5  # the share of GPU_BANDWIDTH that generation reaches
LINK = 50e9  # bytes per second and GPU between GPUs: 400 Gbit/s, less than NVLink
PCIE = 25e9  # bytes per second between a GPU and the CPU's memory: half of PCIe 5.0's nominal rate
CPU_BANDWIDTH = 40e9  # bytes per second and GPU of the CPU's memory: an eighth of half of two sockets' 614 GB/s

# A self-hosted teacher: 32 billion parameters in bf16 on two such GPUs, 64 sequences at a time, and a prefix cache
# that serves four of five prompt tokens.
TEACHER_PARAMETERS, TEACHER_GPUS, TEACHER_SEQUENCES, TEACHER_CACHED = 32e9, 2, 64, 0.8

# The method's defaults.
NUM_CHUNKS, CHUNK_LENGTH, NUM_ROLLOUTS, ROLLOUT_TOKENS = 10, 50, 10, 70


# ---- Memory ----


@dataclass(frozen=True)
class BackEnd:
    """Bytes per parameter on one of N GPUs: `whole + split / N`, for the student and for the reference.

    Attributes:
        name: name of the launch in the tables.
        whole: bytes on every GPU: the weight, its gradient, optimizer states.
        split: bytes that the GPUs share.
        whole_reference: bytes of the frozen reference on every GPU.
        split_reference: bytes of the frozen reference that the GPUs share.
        buckets: bytes of the communication buffers of gradients, with several GPUs.
        waits: bytes of a whole gradient that is kept between the micro-batches of a step. The last backward reduces it
            layer by layer into 4 bytes of `split`.
        gathers: bytes of the head and one layer, gathered while they are used.
        copies: bytes of copies of the layers' weights, from their use to the end of a forward.
        gathers_reference: bytes of the reference's embeddings, head and one layer, gathered in its forward.
        lends: bytes of the reference's embeddings, head and one layer on the GPU, with an offloaded reference.
        autocasts: whether weights and the states between layers are in float32.
        adapters: whether only a LoRA adapter is trained. Other weights have no gradients then.
        clones: bytes of the copy of the reference's head, from its forward to the backward.
        sends: bytes that a GPU sends per micro-batch, and in addition per step. An all-reduce counts twice, as a
            reduce-scatter and an all-gather.
        hides: whether communication overlaps with computation.
        copies_over: bytes that a GPU exchanges with the CPU, per parameter of its share: for each micro-batch after
            the first, and per step.
        updates_on_cpu: bytes that Adam on the CPU reads and writes.
        min_gpus: least number of GPUs.
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
    autocasts: bool = False
    adapters: bool = False
    clones: float = 0.0
    sends: tuple[float, float] = (0.0, 0.0)
    hides: bool = False
    copies_over: tuple[float, float] = (0.0, 0.0)
    updates_on_cpu: float = 0.0
    min_gpus: int = 1


# DDP and FSDP2 keep weights, gradients and Adam's two moments in float32, and compute in bf16: DDP on autocast's
# copies of the trained weights, FSDP2 on the gathered weights. DeepSpeed has bf16 weights and gradients, and float32
# gradients, weights and moments of the part that a GPU updates. Gathered weights and their gradients are bf16.
#
# Communication: DDP reduces float32 gradients once per step. ZeRO-2 reduces them in bf16 with every micro-batch, as an
# all-reduce, and gathers the new weights at the end. ZeRO-3 gathers all weights five times per micro-batch: for
# scoring, in the student's forward, twice in its backward, since checkpointing runs the layers again, and for the
# reference. FSDP2 gathers once in the backward, and reduces once per step.
_DDP: dict[str, Any] = {"autocasts": True, "buckets": 4, "copies": 2, "sends": (0, 2 * 4), "hides": True}
_ZERO2: dict[str, Any] = {"sends": (2 * 2, 2)}  # DeepSpeed's `overlap_comm` is off by default for ZeRO-2
_ZERO3: dict[str, Any] = {"gathers": 4, "sends": (5 * 2 + 2, 0), "hides": True, "min_gpus": 8}
# bf16 gradients are copied to the CPU, and back for accumulation. For the update they are copied in float32, and the
# weights return in bf16. Adam reads gradients, weights and two moments in float32, and writes all but the gradients.
_CPU: dict[str, Any] = {"copies_over": (2 + 2, 4 + 2), "updates_on_cpu": 4 * (4 + 3)}

BACK_ENDS = (
    BackEnd("`single_gpu`, `multi_gpu`", 4 + 4 + 8, 0, 4, 0, **_DDP),
    BackEnd("the same, `ref_model_offload`", 4 + 4 + 8, 0, 0, 0, lends=4, **_DDP),
    BackEnd("the same, LoRA", 4, 0, 0, 0, autocasts=True, adapters=True),
    BackEnd("`zero2`", 2, 2 + 4 + 4 + 8, 2, 0, min_gpus=8, **_ZERO2),
    BackEnd("`zero2`, optimizer on the CPU", 2, 0, 2, 0, **_ZERO2, **_CPU),
    BackEnd("`zero3`", 0, 2 + 2 + 4 + 4 + 8, 0, 2, **_ZERO3),
    BackEnd("`zero3`, optimizer on the CPU", 0, 2, 0, 2, **_ZERO3, **_CPU),
    BackEnd(
        "`fsdp2`",
        *(0, 4 + 4 + 8, 0, 4),
        waits=2,
        gathers=4,
        gathers_reference=2,
        clones=2,
        sends=(4 * 2, 2),
        hides=True,
        min_gpus=8,
    ),
)
_BY_NAME = {back_end.name: back_end for back_end in BACK_ENDS}
TILE = 4096 * 32_768  # logits: tokens by vocabulary entries


def student_bytes(student: Shape, back_end: BackEnd, gpus: int, accumulates: bool) -> float:
    """Weights, gradients and optimizer states on one GPU. `accumulates`: whether a step has several micro-batches."""
    per_parameter = back_end.whole + back_end.split / gpus
    if gpus > 1:
        per_parameter += back_end.buckets
    if accumulates:
        per_parameter += max(0.0, back_end.waits - 4 / gpus)
    return per_parameter * student.parameters


def reference_bytes(student: Shape, back_end: BackEnd, gpus: int) -> float:
    """Bytes of the reference's weights on one GPU."""
    return (back_end.whole_reference + back_end.split_reference / gpus) * student.parameters


def gathered(student: Shape) -> int:
    """Parameters of the head and one layer."""
    return student.head_parameters + student.layer_parameters


def lent(student: Shape) -> int:
    """Parameters of the embeddings, the head and one layer."""
    return student.parameters - (student.layers - 1) * student.layer_parameters


def state_bytes(student: Shape, back_end: BackEnd, gpus: int, accumulates: bool) -> float:
    """Weights, gradients, optimizer states and the reference on one GPU, with gathered weights."""
    states = student_bytes(student, back_end, gpus, accumulates) + reference_bytes(student, back_end, gpus)
    return states + back_end.gathers * gathered(student) + back_end.lends * lent(student)


def layer_bytes(student: Shape, tokens: int, autocasts: bool) -> float:
    """Peak memory of one layer while it is recomputed and differentiated, in bf16.

    The coefficients come from the code of Qwen3 in transformers, by the check below. They are the number of
    activations of each width at the peak, where float32 activations count twice. Autocast makes norms, residuals and
    their gradients float32, and keeps copies of weights.
    """
    queries, keys = student.heads * student.head_dim, student.kv_heads * student.head_dim
    hidden, weights = (15 * student.hidden, 1.5 * student.layer_weights) if autocasts else (10 * student.hidden, 0.0)
    return 2 * tokens * (hidden + 5 * queries + 6 * student.intermediate + 5.5 * keys) + weights


def loss_bytes(student: Shape, back_end: BackEnd, tokens: int) -> float:
    """The maximum of three moments in the backward of chunk loss and anchor, with the states at each moment.

    The anchor is first. It needs two tiles of logits in float32, and the casts of two tiles. Its gradient of the head
    is accumulated in float32. If the head is in bf16, the gradient is then cast while the tiles still exist. The chunk
    loss has a separate gradient of the head until the two are added: 4 and 4 bytes, or 2 with 4 and 2.
    """
    head, states = student.head_parameters, tokens * student.hidden
    # States of the student, of un-audited tokens and of the reference. Their gradient is float32, with a cast in bf16.
    anchor = 3 * state_size(back_end) + (4 if back_end.autocasts else 4 + 2)
    tiles = (2 * 4 + 2 * 2) * TILE
    if back_end.adapters:
        return anchor * states + tiles
    moments = [anchor * states + tiles + (4 + back_end.clones) * head, 4 * state_size(back_end) * states + 8 * head]
    if not back_end.autocasts:  # the last tile is narrower: its cast counts half
        moments.append(anchor * states + (2 * 4 + 1) * TILE + (4 + 2 + back_end.clones) * head)
    return max(moments)


def forward_bytes(student: Shape, back_end: BackEnd, tokens: int) -> float:
    """At the end of a forward: copies of weights, gathered and cloned weights of the reference, states, two tiles."""
    weights = back_end.copies * student.layers * student.layer_weights
    weights += back_end.gathers_reference * lent(student) + back_end.clones * student.head_parameters
    states = 3 * state_size(back_end) * tokens * student.hidden
    return weights + max(states + 2 * 4 * TILE, last_layer_bytes(student, tokens))


def last_layer_bytes(student: Shape, tokens: int) -> float:
    """Bytes of the last layer in a forward: three activations of its MLP in bf16, and two float32 states."""
    return tokens * (2 * 3 * student.intermediate + 4 * 2 * student.hidden)


def state_size(back_end: BackEnd) -> int:
    """Bytes of a number in the states between layers."""
    return 4 if back_end.autocasts else 2


def work_bytes(student: Shape, back_end: BackEnd, tokens: int) -> float:
    """Bytes of a forward and backward with gradient checkpointing: the layers' inputs, and the peak above them."""
    inputs = state_size(back_end) * tokens * student.layers * student.hidden
    layer = layer_bytes(student, tokens, back_end.autocasts)
    loss = loss_bytes(student, back_end, tokens)
    return inputs + max(layer, loss, forward_bytes(student, back_end, tokens))


def gpu_bytes(student: Shape, back_end: BackEnd, gpus: int, tokens: int = TOKENS) -> float:
    """Peak bytes of one GPU that trains on one trajectory at a time."""
    states = state_bytes(student, back_end, gpus, accumulates=per_gpu(gpus) > 1)
    return states + work_bytes(student, back_end, tokens)


def runs(student: Shape, back_end: BackEnd, gpus: int) -> bool:
    """Whether there are enough GPUs with enough memory. 5% are reserved for the allocator."""
    return gpus >= back_end.min_gpus and gpu_bytes(student, back_end, gpus) < 0.95 * GPU_MEMORY


# ---- Work ----


def step_flops(student: Shape, tokens: int = TOKENS, adapters: bool = False) -> float:
    """Operations for one trajectory except generation: scoring, the student's forward and backward, the reference.

    A backward costs two forwards, and gradient checkpointing adds one: 1 + (1 + 1 + 2) + 1 forwards in total. There is
    one projection for the scores. The loss has two in the forward (student and reference), two in the backward, which
    recomputes its tiles, and two for the gradients. Frozen matrices have no gradients: with adapters only, each has
    one product less.
    """
    flops = 6 * student.forward_flops(tokens) + (1 + 2 + 2 + 2) * student.projection_flops(tokens)
    if adapters:
        flops -= tokens * student.layers * 2 * student.layer_weights + student.projection_flops(tokens)
    return flops


def training_seconds(student: Shape, gpus: int, adapters: bool = False) -> float:
    """Seconds of one optimizer step without generation."""
    return per_gpu(gpus) * step_flops(student, adapters=adapters) / (UTILIZATION * GPU_FLOPS)


def per_gpu(gpus: int) -> float:
    """Trajectories that one GPU generates and trains on in a step."""
    return max(SEQUENCES, gpus) / gpus


def generation_seconds(student: Shape, gpus: int) -> float:
    """Seconds of generation in one optimizer step. Every GPU decodes its trajectories in one batch.

    Each decoding step reads all weights once, and the keys and values of each trajectory.
    """
    weights = 2 * (student.parameters - (0 if student.tied else student.head_parameters))
    cache = per_gpu(gpus) * student.cache_bytes(TOKENS / 2, 2)
    return TOKENS * (weights + cache) / (DECODE_EFFICIENCY * GPU_BANDWIDTH)


def sent_bytes(student: Shape, back_end: BackEnd, gpus: int, micro_batches: float) -> float:
    """Bytes that a GPU sends to others in one optimizer step."""
    per_micro_batch, per_step = back_end.sends
    return (micro_batches * per_micro_batch + per_step) * student.parameters * (gpus - 1) / gpus


def moved_seconds(student: Shape, back_end: BackEnd, gpus: int) -> tuple[float, float]:
    """Seconds of one optimizer step: sending to other GPUs, and transfers between GPU, CPU and CPU memory."""
    n, micro_batches = student.parameters, per_gpu(gpus)
    sent = sent_bytes(student, back_end, gpus, micro_batches) / LINK
    further, once = back_end.copies_over
    over = ((micro_batches - 1) * further + once) * n / gpus / PCIE
    over += back_end.updates_on_cpu * n / gpus / CPU_BANDWIDTH
    return sent, over + micro_batches * back_end.lends * n / PCIE  # the offloaded reference is copied for each


def waiting_seconds(student: Shape, back_end: BackEnd, gpus: int) -> float:
    """The part of `moved_seconds` that does not overlap with computation.

    Communication of every micro-batch overlaps with all of its computation. Communication once per step overlaps with
    one backward.
    """
    sent, over = moved_seconds(student, back_end, gpus)
    if back_end.hides:
        training = training_seconds(student, gpus, back_end.adapters)
        sent = max(0.0, sent - (training if back_end.sends[0] else training / per_gpu(gpus) / 2))
    return sent + over


def step_seconds(student: Shape, back_end: BackEnd, gpus: int) -> float:
    """Seconds of one optimizer step: generation, training and waiting."""
    training = training_seconds(student, gpus, back_end.adapters)
    return generation_seconds(student, gpus) + training + waiting_seconds(student, back_end, gpus)


def teacher_tokens(gpus: int, seconds: float) -> tuple[float, float]:
    """Prompt and completion tokens per second that the teacher must deliver for steps of this duration."""
    chunks = max(SEQUENCES, gpus) * NUM_CHUNKS
    return chunks * TOKENS / 2 / seconds, chunks * NUM_ROLLOUTS * ROLLOUT_TOKENS / seconds


def teacher_servers(reads: float, writes: float) -> float:
    """Number of self-hosted teachers that deliver this many prompt and completion tokens per second."""
    decode = TEACHER_SEQUENCES * DECODE_EFFICIENCY * GPU_BANDWIDTH * TEACHER_GPUS / (2 * TEACHER_PARAMETERS)
    prefill = UTILIZATION * GPU_FLOPS * TEACHER_GPUS / (2 * TEACHER_PARAMETERS) / (1 - TEACHER_CACHED)
    return reads / prefill + writes / decode


# ---- Tables ----


def memory_table() -> list[str]:
    """GiB per GPU. Bold if it does not fit."""
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
        for gpus in GPUS:
            fitting = [back_end for back_end in BACK_ENDS if runs(student, back_end, gpus)]
            if not fitting:
                rows.append(f"| {student.name} | {gpus} | no launch fits | | | | | | |")
                continue
            step = min(step_seconds(student, back_end, gpus) for back_end in fitting)
            parts = [generation_seconds(student, gpus)]
            parts += [training_seconds(student, gpus, adapters) for adapters in (False, True)]
            reads, writes = teacher_tokens(gpus, step)
            cells = [student.name, str(gpus), *(f"{p:.0f}" for p in parts), f"{step:.0f}"]
            cells += [f"{reads:,.0f}", f"{writes:,.0f}", f"{teacher_servers(reads, writes):.1f}"]
            rows.append(f"| {' | '.join(cells)} |")
    return rows


def step_table() -> list[str]:
    """Seconds per step of each launch: transfers, the waiting part of them, and the step. Blank if it does not run."""
    columns = [f"{n} GPU{'s' * (n > 1)}: moves | waits | step" for n in GPUS]
    rows = [f"| student | launch | {' | '.join(columns)} |", "|---|---|" + "---|" * 3 * len(GPUS)]
    for student in QWEN3:
        for back_end in BACK_ENDS:
            cells = []
            for gpus in GPUS:
                if not runs(student, back_end, gpus):
                    cells += [""] * 3
                    continue
                moves, waits = sum(moved_seconds(student, back_end, gpus)), waiting_seconds(student, back_end, gpus)
                cells += [f"{moves:.1f}", f"{waits:.1f}", f"{step_seconds(student, back_end, gpus):.0f}"]
            if any(cells):
                rows.append(f"| {student.name} | {back_end.name} | {' | '.join(cells)} |")
    return rows


# ---- The checks ----


def traced(student: Shape, tokens: int = TOKENS, autocasts: bool = False) -> dict[str, float]:
    """Bytes and FLOPs of the student's code: a forward and backward with checkpointing and gradient accumulation.

    Weights are in bf16, or in float32 under autocast.

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
        model = student.model(cpu, dtype).train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        ids = torch.zeros(1, tokens, dtype=torch.long)
        gradient = torch.zeros(1, tokens, student.hidden, dtype=dtype)
        # transformers cannot inspect the mask of a fake tensor, and would build one of `T * T`.
        no_mask = {"full_attention": None}

        def states() -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocasts):
                return model.base_model(input_ids=ids, attention_mask=no_mask, use_cache=False).last_hidden_state

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
    TINY.model(torch.device("cpu"), torch.float32).save_pretrained(folder / "model")
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
        print("\n".join([*memory_table(), "", *time_table(), "", *step_table()]))
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
