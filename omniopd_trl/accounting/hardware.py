# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Memory per GPU and time per step of a model on a back end, by the formulas of docs/scaling.md.

This module is arithmetic. It needs neither a GPU nor torch. Sizes are in bytes, and times in seconds.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from omniopd_trl.errors import ConfigError

GIB = 2**30


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder with gated MLPs, such as Qwen3, and derived counts.

    Attributes:
        name: name of the model.
        hidden: width of the states between layers.
        layers: number of layers.
        intermediate: width of an MLP, of one expert in a mixture of experts.
        heads: heads of the queries.
        tied: whether the LM head is the embedding matrix.
        kv_heads: heads of the keys and of the values.
        head_dim: width of a head.
        vocabulary: rows of the embedding matrix.
        experts: MLPs of a layer.
        active_experts: MLPs of a layer that a token uses.
    """

    name: str
    hidden: int
    layers: int
    intermediate: int
    heads: int
    tied: bool = True
    kv_heads: int = 8
    head_dim: int = 128
    vocabulary: int = 151_936
    experts: int = 1
    active_experts: int = 1

    @classmethod
    def of(cls, name: str, config: Any) -> "Shape":
        """The sizes in a configuration of `transformers`.

        Args:
            name: name of the model.
            config: its text configuration.

        Raises:
            ConfigError: when a size is missing, as in a model that is no decoder with attention.
        """
        heads = getattr(config, "num_attention_heads", None)
        hidden = getattr(config, "hidden_size", None)
        experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None) or 1
        sizes: dict[str, Any] = {
            "hidden": hidden,
            "layers": getattr(config, "num_hidden_layers", None),
            "intermediate": getattr(config, "moe_intermediate_size", None)
            or getattr(config, "intermediate_size", None),
            "heads": heads,
            "vocabulary": getattr(config, "vocab_size", None),
            "kv_heads": getattr(config, "num_key_value_heads", None) or heads,
            "head_dim": getattr(config, "head_dim", None) or (hidden // heads if hidden and heads else None),
        }
        missing = [key for key, value in sizes.items() if not isinstance(value, int)]
        if missing:
            raise ConfigError(
                f"The configuration of {name!r} ({type(config).__name__}) does not state its {', '.join(missing)}, on "
                "which the memory of a GPU depends. Leave out --gpu."
            )
        return cls(
            name,
            tied=bool(getattr(config, "tie_word_embeddings", False)),
            experts=experts,
            active_experts=min(experts, getattr(config, "num_experts_per_tok", None) or 1),
            **sizes,
        )

    @property
    def _attention_weights(self) -> int:
        return self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)

    def _mlp_weights(self, experts: int) -> int:
        router = self.hidden * self.experts if self.experts > 1 else 0
        return 3 * self.hidden * self.intermediate * experts + router

    @property
    def layer_weights(self) -> int:
        """Weights of the matrices in one layer that a token uses. A forward uses each of them once per token."""
        return self._attention_weights + self._mlp_weights(self.active_experts)

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer: its matrices, two norms, and the norms of queries and keys."""
        return self._attention_weights + self._mlp_weights(self.experts) + 2 * self.hidden + 2 * self.head_dim

    @property
    def head_parameters(self) -> int:
        """Parameters of the LM head. A tied model shares them with its embeddings."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """Parameters of the whole model."""
        embeddings = self.head_parameters * (1 if self.tied else 2)
        return self.layers * self.layer_parameters + embeddings + self.hidden

    def lora_parameters(self, rank: int, targets: "str | Iterable[str] | None") -> int:
        """Parameters of a LoRA adapter.

        Args:
            rank: rank of the adapter.
            targets: names of the adapted matrices, as in `lora_target_modules`; `"all-linear"` for those of all
                layers; `None` for PEFT's choice, which is the projections of queries and values.
        """
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        sides = {
            **{"q_proj": self.hidden + queries, "k_proj": self.hidden + keys, "v_proj": self.hidden + keys},
            "o_proj": queries + self.hidden,
            **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), self.experts * (self.hidden + self.intermediate)),
        }
        if targets is None:
            targets = ("q_proj", "v_proj")
        names = sides if targets == "all-linear" else [targets] if isinstance(targets, str) else targets
        return self.layers * rank * sum(sides.get(name, 0) for name in names)

    def forward_flops(self, tokens: float) -> float:
        """Floating-point operations of the layers on one sequence.

        Two per weight and token. Causal attention compares half of all pairs of tokens.
        """
        attention = 4 * self.heads * self.head_dim * tokens / 2
        return tokens * self.layers * (2 * self.layer_weights + attention)

    def projection_flops(self, tokens: float) -> float:
        """Floating-point operations of projecting `tokens` states to the vocabulary."""
        return 2 * tokens * self.head_parameters

    def cache_bytes(self, tokens: float, itemsize: int) -> float:
        """Bytes of the keys and values of one sequence."""
        return 2 * self.layers * self.kv_heads * self.head_dim * tokens * itemsize


# Sizes of the published models, so that a forecast needs no network.
QWEN3 = (
    Shape("Qwen3-1.7B", 2048, 28, 6144, 16),
    Shape("Qwen3-4B", 2560, 36, 9728, 32),
    Shape("Qwen3-8B", 4096, 36, 12_288, 32, tied=False),
    Shape("Qwen3-32B", 5120, 64, 25_600, 64, tied=False),
)
_QWEN3_30B_A3B = Shape("Qwen3-30B-A3B", 2048, 48, 768, 32, False, kv_heads=4, experts=128, active_experts=8)


def known_shape(name: str) -> Shape | None:
    """The sizes of a Qwen3 model by its id on the Hub, such as `"Qwen/Qwen3-4B"`; `None` for any other name."""
    plain = re.fullmatch(r"Qwen/(Qwen3-\w+(\.\w+)?(-A3B)?)(-Base|-Instruct-2507|-Thinking-2507)?", name)
    return next((shape for shape in (*QWEN3, _QWEN3_30B_A3B) if plain and shape.name == plain[1]), None)


@dataclass(frozen=True)
class GPU:
    """Limits of a GPU, from its data sheet.

    Attributes:
        name: its name in words.
        memory: bytes.
        flops: dense bf16 operations per second, accumulated in float32.
        bandwidth: bytes per second of its memory.
        link: bytes per second to the other GPUs, in one direction. An assumption.
        source: where the numbers are from.
    """

    name: str
    memory: float
    flops: float
    bandwidth: float
    link: float
    source: str


PCIE = 25e9  # bytes per second between a GPU and the CPU's memory: half of PCIe 5.0's nominal rate
LINK = 50e9  # bytes per second and GPU between GPUs: 400 Gbit/s, less than NVLink

GPUS: Mapping[str, GPU] = {
    "rtx3090": GPU("GeForce RTX 3090", 24e9, 71e12, 936e9, PCIE, "NVIDIA Ampere GA102 white paper"),
    "rtx4090": GPU("GeForce RTX 4090", 24e9, 165e12, 1008e9, PCIE, "NVIDIA Ada GPU architecture white paper"),
    "l4": GPU("L4", 24e9, 121e12, 300e9, PCIE, "NVIDIA L4 data sheet"),
    "a100-40": GPU("A100 40 GB", 40e9, 312e12, 1555e9, LINK, "NVIDIA A100 data sheet"),
    "a100-80": GPU("A100 80 GB", 80e9, 312e12, 2039e9, LINK, "NVIDIA A100 data sheet, SXM"),
    "h100-80": GPU("H100 80 GB", 80e9, 989e12, 3.35e12, LINK, "NVIDIA H100 data sheet, SXM"),
    "h200": GPU("H200", 141e9, 989e12, 4.8e12, LINK, "NVIDIA H200 data sheet, SXM"),
}

# Assumptions. docs/scaling.md compares them with measurements.
RESERVED = 0.05  # the share of a GPU's memory that the allocator and the driver need
UTILIZATION = 0.4  # the share of the arithmetic that training reaches
DECODE_EFFICIENCY = 0.5  # the share of the bandwidth that vLLM reaches
TRANSFORMERS_EFFICIENCY = 0.08  # the same for generation with transformers, as measured on a CPU
CPU_BANDWIDTH = 40e9  # bytes per second and GPU of the CPU's memory: an eighth of half of two sockets' 614 GB/s
ENGINE_BYTES = 2 * GIB  # what vLLM needs beside weights and cache: activations, graphs, the tables of its sampler
MAX_SEQUENCES = 256  # sequences that vLLM decodes at once

# A self-hosted teacher: 32 billion parameters in bf16 on two H100s, 64 sequences at a time, and a prefix cache that
# serves four of five prompt tokens.
TEACHER_PARAMETERS, TEACHER_GPUS, TEACHER_SEQUENCES, TEACHER_CACHED = 32e9, 2, 64, 0.8

TILE = 4096 * 32_768  # logits: tokens by vocabulary entries


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


Packing = Literal["mask", "blocks", "rows"]


@dataclass(frozen=True)
class Forks:
    """Branches and imitated rollouts of a trajectory. All counts are upper bounds.

    Equal branches are merged, tokens that a branch shares with its trajectory are not repeated, and forks whose
    branches agree are dropped.

    Attributes:
        num_chunks: forks that are trained, M.
        chunk_length: tokens of a branch, C.
        num_branches: branches of a fork besides the trajectory's own, K. 0 without branches.
        candidates: forks at which branches are sampled.
        num_imitated: rollouts of a fork that are imitated, N. 0 without imitation.
        imitated_tokens: tokens of each.
        merges: whether chunks are joined. One may then be as long as all candidates.
        packing: how the student computes them. `"mask"`: behind the trajectory, with a mask of one byte for each pair
            of tokens (`sdpa`, `eager`); `"blocks"`: the same with a mask for blocks (`flex_attention`); `"rows"`: in
            rows of their own, each padded to the length of the trajectory (any other attention).
    """

    num_chunks: int
    chunk_length: int
    num_branches: int = 0
    candidates: int = 0
    num_imitated: int = 0
    imitated_tokens: int = 0
    merges: bool = False
    packing: Packing = "mask"

    def _that_fit(self, chunks: int, tokens: float) -> float:
        """Number of chunks in a trajectory of `tokens` tokens."""
        return min(chunks, max(1.0, tokens / self.chunk_length))

    def sequences(self, tokens: float) -> float:
        """Branches that are sampled after a trajectory of `tokens` tokens, each of `chunk_length`."""
        return self._that_fit(max(self.candidates, self.num_chunks), tokens) * self.num_branches

    def suffixes(self, tokens: float) -> float:
        """Branches and rollouts that are trained beside a trajectory."""
        return self._that_fit(self.num_chunks, tokens) * (self.num_branches + self.num_imitated)

    def inputs(self, tokens: float) -> float:
        """Tokens that the student reads beside a trajectory. The last token of each suffix predicts nothing."""
        imitated = self.num_imitated * max(0, self.imitated_tokens - 1)
        if self.merges:
            branches = self.sequences(tokens) * self.chunk_length
        else:
            branches = self._that_fit(self.num_chunks, tokens) * self.num_branches * (self.chunk_length - 1)
        return branches + self._that_fit(self.num_chunks, tokens) * imitated

    def added(self, tokens: float) -> float:
        """Tokens of the student's forward for the loss, beside those of a trajectory."""
        return self.suffixes(tokens) * tokens if self.packing == "rows" else self.inputs(tokens)


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


def layer_bytes(student: Shape, tokens: float, autocasts: bool) -> float:
    """Peak memory of one layer while it is recomputed and differentiated, in bf16.

    The coefficients come from the code of Qwen3 in transformers, by the check below. They are the number of
    activations of each width at the peak, where float32 activations count twice. Autocast makes norms, residuals and
    their gradients float32, and keeps copies of weights.
    """
    queries, keys = student.heads * student.head_dim, student.kv_heads * student.head_dim
    hidden, weights = (15 * student.hidden, 1.5 * student.layer_weights) if autocasts else (10 * student.hidden, 0.0)
    return 2 * tokens * (hidden + 5 * queries + 6 * student.intermediate + 5.5 * keys) + weights


def loss_bytes(student: Shape, back_end: BackEnd, tokens: float) -> float:
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


def forward_bytes(student: Shape, back_end: BackEnd, tokens: float) -> float:
    """At the end of a forward: copies of weights, gathered and cloned weights of the reference, states, two tiles."""
    weights = back_end.copies * student.layers * student.layer_weights
    weights += back_end.gathers_reference * lent(student) + back_end.clones * student.head_parameters
    states = 3 * state_size(back_end) * tokens * student.hidden
    return weights + max(states + 2 * 4 * TILE, last_layer_bytes(student, tokens))


def last_layer_bytes(student: Shape, tokens: float) -> float:
    """Bytes of the last layer in a forward: three activations of its MLP in bf16, and two float32 states."""
    return tokens * (2 * 3 * student.intermediate + 4 * 2 * student.hidden)


def state_size(back_end: BackEnd) -> int:
    """Bytes of a number in the states between layers."""
    return 4 if back_end.autocasts else 2


def mask_bytes(student: Shape, tokens: float) -> tuple[float, float]:
    """Bytes of a mask for each pair of tokens of one row: from the forward to the backward, and in one layer.

    PyTorch copies the mask in bf16 for a layer, and transformers repeats keys and values for each head of the queries.
    """
    repeated = 2 * (student.heads - student.kv_heads) * student.head_dim
    return tokens**2, 2 * (tokens**2 + tokens * repeated)


def work_bytes(student: Shape, back_end: BackEnd, tokens: float, masked: float = 0.0) -> float:
    """Bytes of a forward and backward with gradient checkpointing: the layers' inputs, and the peak above them.

    `masked` are the bytes that a mask adds to a layer.
    """
    inputs = state_size(back_end) * tokens * student.layers * student.hidden
    layer = layer_bytes(student, tokens, back_end.autocasts) + masked
    loss = loss_bytes(student, back_end, tokens)
    return inputs + max(layer, loss, forward_bytes(student, back_end, tokens))


def sent_bytes(student: Shape, back_end: BackEnd, gpus: int, micro_batches: float) -> float:
    """Bytes that a GPU sends to others in one optimizer step."""
    per_micro_batch, per_step = back_end.sends
    return (micro_batches * per_micro_batch + per_step) * student.parameters * (gpus - 1) / gpus


def moved_seconds(
    student: Shape, back_end: BackEnd, gpu: GPU, num_gpus: int, micro_batches: float
) -> tuple[float, float]:
    """Seconds of one optimizer step: sending to other GPUs, and transfers between GPU, CPU and CPU memory."""
    n = student.parameters
    sent = sent_bytes(student, back_end, num_gpus, micro_batches) / gpu.link
    further, once = back_end.copies_over
    over = ((micro_batches - 1) * further + once) * n / num_gpus / PCIE
    over += back_end.updates_on_cpu * n / num_gpus / CPU_BANDWIDTH
    return sent, over + micro_batches * back_end.lends * n / PCIE  # the offloaded reference is copied for each


def waiting_seconds(back_end: BackEnd, sent: float, over: float, training: float, micro_batches: float) -> float:
    """The part of `sent` and `over` of [`moved_seconds`] that does not overlap with `training` seconds of computation.

    Communication of every micro-batch overlaps with all of its computation. Communication once per step overlaps with
    one backward.
    """
    if back_end.hides:
        sent = max(0.0, sent - (training if back_end.sends[0] else training / micro_batches / 2))
    return sent + over


# Forwards of the layers and projections to the vocabulary for one trajectory, by method. A backward costs two
# forwards, and gradient checkpointing adds one: 1 + 1 + 2 forwards for the student. A loss has one projection in the
# forward, one in the backward, which recomputes its tiles, and two for the gradients.
# omniopd: scoring and the reference add a forward each. Scoring has one projection; the loss projects two models.
# opd: the loss projects two models. The teacher's forward is counted apart.
# grpo: scoring, as omniopd. TRL scores because vLLM samples.
_PASSES = {
    "omniopd": (1 + 4 + 1, 1 + 2 + 2 + 2),
    "opd": (4, 2 + 2 + 2),
    "sft": (4, 1 + 1 + 2),
    "grpo": (1 + 4, 1 + 1 + 1 + 2),
}


def step_flops(student: Shape, tokens: float, adapters: bool = False, method: str = "omniopd") -> float:
    """Operations for one trajectory except generation and a local teacher: scoring, training, the reference.

    Frozen matrices have no gradients: with adapters only, each has one product less.
    """
    forwards, projections = _PASSES[method]
    flops = forwards * student.forward_flops(tokens) + projections * student.projection_flops(tokens)
    if adapters:
        flops -= tokens * student.layers * 2 * student.layer_weights + student.projection_flops(tokens)
    return flops


def forks_flops(student: Shape, tokens: float, forks: Forks, adapters: bool = False) -> float:
    """Operations that branches and imitated rollouts add to [`step_flops`] of a trajectory of `tokens` tokens.

    Only the student's loss has them: 4 forwards of the layers, and 4 projections of each target. Scoring and the
    reference have the trajectory alone.
    """
    added, targets = forks.added(tokens), forks.inputs(tokens) + forks.suffixes(tokens)
    pairs = {
        "mask": (tokens + added) ** 2 - tokens**2 / 2,  # all pairs are computed, and not half of them
        "blocks": added * (tokens + forks.chunk_length) / 2,  # forks are spread evenly over the trajectory
        "rows": added * tokens / 2,
    }[forks.packing]
    linear, projections = added * student.layers * 2 * student.layer_weights, student.projection_flops(targets)
    attention = student.layers * 4 * student.heads * student.head_dim * pairs
    return 4 * (linear + attention + projections) - (linear + projections if adapters else 0.0)


def generation_seconds(
    student: Shape,
    gpu: GPU,
    sequences: float,
    tokens: float,
    *,
    read: float = 0.0,
    held: float = 0.0,
    cache_tokens: float = math.inf,
    efficiency: float = DECODE_EFFICIENCY,
) -> float:
    """Seconds in which one GPU writes `sequences` sequences of `tokens` tokens, decoded together.

    Each decoding step reads all weights once, and the keys and values of each sequence.

    Args:
        student: sizes of the model, whose weights are in bf16.
        gpu: the GPU.
        sequences: number of sequences.
        tokens: length of each.
        read: tokens before each sequence, whose keys and values a decoding step reads for it.
        held: tokens before each sequence that are held for it. Less than `read` where sequences share them.
        cache_tokens: tokens of keys and values that fit at once. The sequences are decoded in turns if all do not fit.
        efficiency: share of the bandwidth that is reached.
    """
    weights = 2 * (student.parameters - (0 if student.tied else student.head_parameters))
    turns = max(1.0, sequences * (held + tokens) / cache_tokens, sequences / MAX_SEQUENCES)
    cache = sequences * student.cache_bytes(read + tokens / 2, 2)
    return tokens * (turns * weights + cache) / (efficiency * gpu.bandwidth)


def teacher_servers(reads: float, writes: float) -> float:
    """Number of self-hosted teachers that deliver this many prompt and completion tokens per second.

    With tokens instead of tokens per second: the seconds in which one server delivers them.
    """
    gpu = GPUS["h100-80"]
    decode = TEACHER_SEQUENCES * DECODE_EFFICIENCY * gpu.bandwidth * TEACHER_GPUS / (2 * TEACHER_PARAMETERS)
    prefill = UTILIZATION * gpu.flops * TEACHER_GPUS / (2 * TEACHER_PARAMETERS) / (1 - TEACHER_CACHED)
    return reads / prefill + writes / decode
