# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""A training run on GPUs: whether it fits, how long a step takes, and what to change; see `hardware`."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple, get_args

from omniopd_trl.accounting.hardware import (
    BACK_ENDS,
    DECODE_EFFICIENCY,
    ENGINE_BYTES,
    GPU,
    RESERVED,
    TRANSFORMERS_EFFICIENCY,
    UTILIZATION,
    BackEnd,
    Forks,
    Packing,
    Shape,
    forks_flops,
    generation_seconds,
    last_layer_bytes,
    mask_bytes,
    moved_seconds,
    state_bytes,
    state_size,
    step_flops,
    waiting_seconds,
    work_bytes,
)
from omniopd_trl.errors import ConfigError

Launch = Literal["single_gpu", "multi_gpu", "zero2", "zero3", "fsdp2"]
LAUNCHES: tuple[Launch, ...] = get_args(Launch)
_BY_NAME = {back_end.name: back_end for back_end in BACK_ENDS}
# Bytes per parameter of the frozen weights with LoRA: on every GPU, and shared by the GPUs.
_FROZEN: Mapping[Launch, tuple[float, float]] = {
    "single_gpu": (4, 0),
    "multi_gpu": (4, 0),
    "zero2": (2, 0),
    "zero3": (0, 2),
    "fsdp2": (0, 4),
}
_ADAPTER_BYTES = 4 + 4 + 8  # an adapter's weights, gradients and moments are in float32


class Step(NamedTuple):
    """Seconds of one optimizer step, without a teacher's answers."""

    generation: float
    training: float
    waiting: float

    @property
    def total(self) -> float:
        """Their sum."""
        return sum(self)


@dataclass(frozen=True)
class Job:
    """A training run on GPUs of one kind, one process per GPU, with gradient checkpointing.

    Attributes:
        student: sizes of the student.
        gpu: the GPU.
        num_gpus: number of GPUs.
        launch: launch configuration, as in `--accelerate_config`.
        method: training method.
        max_tokens: longest trajectory with its prompt, in tokens.
        rows: trajectories of a micro-batch.
        micro_batches: micro-batches per step and GPU.
        num_generations: samples of a prompt, each of them a trajectory (GRPO).
        half: whether weights, gradients and moments are in bf16. Only with `single_gpu` and `multi_gpu`.
        lora_parameters: parameters of the adapter; 0 for full fine-tuning.
        reference_itemsize: bytes of a number in the reference's weights; 0 without a reference, `None` for those of
            the student's weights.
        ref_model_offload: whether the reference is in the CPU's memory between uses.
        optimizer_8bit: whether Adam's moments are in 8 bits. bitsandbytes keeps those of embeddings in 32. Only with
            `single_gpu` and `multi_gpu`.
        teacher: sizes of a teacher on the same GPUs, in bf16; `None` for a service.
        vllm: how vLLM generates; `None` for generation with transformers.
        vllm_utilization: the share of the GPU's memory that a colocated vLLM takes.
        vllm_sleeps: whether a colocated vLLM releases its memory during training.
        vllm_tensor_parallel: GPUs that share one colocated vLLM.
        forks: branches and imitated rollouts; `None` without either.
    """

    student: Shape
    gpu: GPU
    num_gpus: int = 1
    launch: Launch = "single_gpu"
    method: str = "omniopd"
    max_tokens: int = 20_480
    rows: int = 1
    micro_batches: float = 1
    num_generations: int = 1
    half: bool = False
    lora_parameters: int = 0
    reference_itemsize: int | None = None
    ref_model_offload: bool = False
    optimizer_8bit: bool = False
    teacher: Shape | None = None
    vllm: Literal["colocate", "server"] | None = None
    vllm_utilization: float = 0.3
    vllm_sleeps: bool = False
    vllm_tensor_parallel: int = 1
    forks: Forks | None = None

    def __post_init__(self) -> None:
        if self.student.experts > 1:
            raise ConfigError(
                f"{self.student.name} is a mixture of {self.student.experts} experts; the formulas of memory and time "
                "are for dense students. Leave out --gpu."
            )
        if self.launch not in ("single_gpu", "multi_gpu") and (self.half or self.optimizer_8bit):
            what = "an optimizer in 8 bits" if self.optimizer_8bit else "weights in bf16"
            raise ConfigError(
                f"The memory of {what} is known for single_gpu and multi_gpu, not for {self.launch}, which shards the "
                "optimizer anyway. Set `optim: adamw_torch_fused` and `dtype: float32`, or --accelerate_config."
            )

    @cached_property
    def back_end(self) -> BackEnd:
        """Bytes per parameter of this run."""
        if self.launch in ("single_gpu", "multi_gpu"):
            base = _BY_NAME["`single_gpu`, `multi_gpu`"]
            if self.half:
                base = replace(base, whole=2 + 2 + 4, whole_reference=2, autocasts=False, buckets=2, copies=0)
        else:
            base = _BY_NAME[f"`{self.launch}`"]
        if self.lora_parameters:  # frozen weights have no gradients and no moments, and are the reference too
            whole, split = (2, 0) if self.half else _FROZEN[self.launch]
            gathers = {"zero3": 5 * 2, "fsdp2": 4 * 2}.get(self.launch, 0)
            return BackEnd(
                base.name,
                *(whole, split, 0, 0),
                gathers=base.gathers / 2,
                autocasts=base.autocasts,
                adapters=True,
                sends=(gathers, 0),
                hides=base.hides,
            )
        whole, split, itemsize = base.whole_reference, base.split_reference, self.reference_itemsize
        if itemsize is not None:
            whole, split = min(whole, itemsize), min(split, itemsize)
        if self.ref_model_offload:
            return replace(base, whole_reference=0, split_reference=0, lends=max(whole, split))
        return replace(base, whole_reference=whole, split_reference=split)

    @property
    def trajectories(self) -> float:
        """Trajectories of a step per GPU."""
        return self.rows * self.micro_batches * self.num_generations

    @property
    def available(self) -> float:
        """Bytes of a GPU that can be used."""
        return (1 - RESERVED) * self.gpu.memory

    @cached_property
    def states(self) -> float:
        """Bytes of weights, gradients, optimizer, reference, adapter and local teacher on each GPU."""
        accumulates = self.micro_batches * self.num_generations > 1
        size = state_bytes(self.student, self.back_end, self.num_gpus, accumulates)
        if self.optimizer_8bit and not self.lora_parameters:
            # Two moments of 1 byte instead of 4 (of 2 with bf16 weights), with a float32 scale per block of 256.
            saved = 2 * ((2 if self.half else 4) - 1 - 4 / 256)
            size -= saved * (self.student.parameters - self.student.head_parameters)
        size += _ADAPTER_BYTES * self.lora_parameters
        return size + (2 * self.teacher.parameters if self.teacher is not None else 0)

    @cached_property
    def work(self) -> float:
        """Bytes of the forward and backward of a micro-batch, beside the states."""
        tokens: float = self.rows * self.max_tokens
        # Rows of different lengths need a mask, of one byte for each pair of tokens.
        mask: float = self.rows * self.max_tokens**2 if self.rows > 1 else 0
        masked = 0.0
        teacher = last_layer_bytes(self.teacher, tokens) if self.teacher is not None else 0
        if self.forks is not None:
            row = self.max_tokens + self.forks.added(self.max_tokens)
            tokens = self.rows * row
            if self.forks.packing == "mask":
                mask, masked = (self.rows * size for size in mask_bytes(self.student, row))
        return work_bytes(self.student, self.back_end, tokens, masked) + mask + teacher

    @property
    def generates(self) -> bool:
        """Whether the student writes its own trajectories."""
        return self.method != "sft"

    @cached_property
    def engine(self) -> float:
        """Bytes of a colocated vLLM on each GPU."""
        return self.vllm_utilization * self.gpu.memory if self.vllm == "colocate" and self.generates else 0.0

    @cached_property
    def least_engine(self) -> float:
        """Bytes that a colocated vLLM needs for its weights and one trajectory, on each GPU."""
        size = 2 * self.student.parameters + self.student.cache_bytes(self.max_tokens, 2)
        return ENGINE_BYTES + size / self.vllm_tensor_parallel

    @cached_property
    def cache_tokens(self) -> float:
        """Tokens whose keys and values fit into vLLM at once. A server is assumed to be a GPU of the same kind."""
        size, split = (
            (self.engine, self.vllm_tensor_parallel) if self.vllm == "colocate" else (0.9 * self.gpu.memory, 1)
        )
        left = size - 2 * self.student.parameters / split - ENGINE_BYTES
        return max(0.0, left) / (self.student.cache_bytes(1, 2) / split)

    @cached_property
    def training_bytes(self) -> float:
        """Peak bytes of a GPU during training."""
        return self.states + self.work + (0.0 if self.vllm_sleeps else self.engine)

    @cached_property
    def generation_bytes(self) -> float:
        """Peak bytes of a GPU during generation. The gradients count, although most are freed before."""
        if not self.generates:
            return 0.0
        if self.vllm is not None:
            return self.states + self.engine
        item = state_size(self.back_end)
        size = self.trajectories * self.student.cache_bytes(self.max_tokens, item)
        return self.states + max(size, self.student.cache_bytes(self._tree(self.max_tokens), item))

    def shortfalls(self) -> Iterator[tuple[str, float]]:
        """Where memory is short, and by how many bytes."""
        for what, needed in (("training", self.training_bytes), ("generation", self.generation_bytes)):
            if needed > self.available:
                yield what, needed - self.available
        if self.generates and self.vllm == "colocate" and self.cache_tokens < self.max_tokens:
            yield "vLLM", self.least_engine - self.engine

    @property
    def fits(self) -> bool:
        """Whether every GPU has enough memory."""
        return not any(self.shortfalls())

    def _tree(self, tokens: float) -> float:
        """Tokens of keys and values from which transformers samples the branches of one trajectory."""
        forks = self.forks
        if forks is None or forks.packing == "rows":  # each branch has its whole prefix
            return tokens
        return tokens + forks.sequences(tokens) * forks.chunk_length

    def _generate(self, sequences: float, tokens: float, cache_tokens: float, **prefix: float) -> float:
        """Seconds in which this run's engine writes sequences, `sequences` for each GPU."""
        split = self.vllm_tensor_parallel if self.vllm == "colocate" else 1
        return generation_seconds(
            self.student,
            replace(self.gpu, bandwidth=split * self.gpu.bandwidth),
            split * sequences,
            tokens,
            cache_tokens=cache_tokens,
            efficiency=TRANSFORMERS_EFFICIENCY if self.vllm is None else DECODE_EFFICIENCY,
            **prefix,
        )

    def _sampling(self, tokens: float) -> float:
        """Seconds in which the branches of a step are sampled, after the trajectories."""
        if self.forks is None or not self.forks.num_branches:
            return 0.0
        sequences = self.forks.sequences(tokens)
        # The trajectory is computed and held once. vLLM reads the prefix of each branch, half of the trajectory on
        # average, and transformers the trajectory once for all.
        held, flops = tokens / sequences, self.student.forward_flops(tokens)
        read = held if self.vllm is None else tokens / 2
        cache_tokens = max(self.cache_tokens, tokens)
        if self.vllm is None:
            cache_tokens = max(self.trajectories * self.max_tokens, self._tree(tokens))
            if self.forks.packing == "rows":  # each branch computes, holds and reads its prefix
                held = read = tokens / 2
                flops = sequences * self.student.forward_flops(tokens / 2)
        written = self._generate(
            self.trajectories * sequences, self.forks.chunk_length, cache_tokens, read=read, held=held
        )
        return written + self.trajectories * flops / (UTILIZATION * self.gpu.flops)

    def step(self, tokens: float) -> Step:
        """Seconds of one optimizer step whose trajectories have `tokens` tokens each, with their prompts."""
        generation = 0.0
        if self.generates:
            cache_tokens = math.inf if self.vllm is None else max(self.cache_tokens, tokens)
            generation = self._generate(self.trajectories, tokens, cache_tokens) + self._sampling(tokens)
        flops = step_flops(self.student, tokens, self.back_end.adapters, self.method)
        if self.forks is not None:
            flops += forks_flops(self.student, tokens, self.forks, self.back_end.adapters)
        if self.teacher is not None and self.method == "opd":
            flops += self.teacher.forward_flops(tokens)
        training = self.trajectories * flops / (UTILIZATION * self.gpu.flops)
        micro_batches = self.micro_batches * self.num_generations
        sent, over = moved_seconds(self.student, self.back_end, self.gpu, self.num_gpus, micro_batches)
        return Step(generation, training, waiting_seconds(self.back_end, sent, over, training, micro_batches))

    def remedies(self) -> "tuple[list[str], Job] | None":
        """Options that make a job fit, as few as possible, and the job with them; `None` when none do."""
        changes = dict(self._changes())

        def job(options: Iterable[str]) -> Job:
            return replace(self, **{key: value for option in options for key, value in changes[option].items()})

        alone = next(([option] for option in changes if job([option]).fits), None)
        found = [*changes] if alone is None else alone
        if not job(found).fits:
            return None
        for option in reversed(changes):  # leave out what is not needed, the most expensive first
            fewer = [other for other in found if other != option]
            if job(fewer).fits:
                found = fewer
        return found, job(found)

    def _changes(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Options that save memory, those that cost least first."""
        if self.generates and self.vllm is None:
            yield "--use_vllm true --vllm_enable_sleep_mode true", {"vllm": "colocate", "vllm_sleeps": True}
        if self.vllm == "colocate" and not self.vllm_sleeps:
            yield "--vllm_enable_sleep_mode true", {"vllm_sleeps": True}
        if self.rows > 1:
            yield (
                f"--per_device_train_batch_size 1 --gradient_accumulation_steps {self.rows * self.micro_batches:g}",
                {"rows": 1, "micro_batches": self.rows * self.micro_batches},
            )
        if self.forks is not None and self.forks.packing != "blocks":
            # Rows of their own become packed ones, and a mask for each pair of tokens one for blocks.
            packing: Packing = "mask" if self.forks.packing == "rows" else "blocks"
            attention = "sdpa" if packing == "mask" else "flex_attention"
            yield f"--attn_implementation {attention}", {"forks": replace(self.forks, packing=packing)}
        is_ddp = self.launch in ("single_gpu", "multi_gpu")
        if is_ddp and not self.optimizer_8bit and not self.lora_parameters:
            yield "--optim adamw_bnb_8bit", {"optimizer_8bit": True}
        if not self.ref_model_offload and not self.lora_parameters and self.reference_itemsize != 0:
            yield "--ref_model_offload true", {"ref_model_offload": True}
        if is_ddp and self.num_gpus > 1 and not self.lora_parameters:
            optim = " --optim adamw_torch_fused" if self.optimizer_8bit else ""
            yield f"--accelerate_config zero3{optim}", {"launch": "zero3", "optimizer_8bit": False, "half": False}
        if not self.lora_parameters:
            yield "--use_peft true", {"lora_parameters": self.student.lora_parameters(16, None)}
        if self.vllm == "colocate":
            share = math.ceil(20 * self.least_engine / self.gpu.memory) / 20
            if share < 1 and share != self.vllm_utilization:
                yield f"--vllm_gpu_memory_utilization {share:g}", {"vllm_utilization": share}
