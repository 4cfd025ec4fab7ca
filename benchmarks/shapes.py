# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Models with random weights and real sizes, a tokenizer for any vocabulary, and the limits of a device."""

import itertools
import string
import time
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from omniopd_trl.accounting.hardware import QWEN3, Shape


def config_of(shape: Shape) -> Qwen3Config:
    """The configuration of a shape for transformers."""
    return Qwen3Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=40_960,
        tie_word_embeddings=shape.tied,
        eos_token_id=None,
    )


def model_of(shape: Shape, device: torch.device, dtype: torch.dtype, attention: str | None = None) -> Qwen3ForCausalLM:
    """A model with random weights, created on the device. `attention` is its `attn_implementation`."""
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config_of(shape), dtype=dtype, attn_implementation=attention)


QWEN_VOCABULARY = QWEN3[0].vocabulary


def tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of exactly `vocabulary` tokens: bytes, and pieces of words of one to four letters."""
    tokens = ["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges = [("Ġ", letter) for letter in string.ascii_lowercase]
    # Half of the pieces begin a word. Each round makes every piece one letter longer.
    pieces = [piece for letter in string.ascii_lowercase for piece in (letter, "Ġ" + letter)]
    tokens += ["".join(pair) for pair in merges]
    while len(tokens) < vocabulary:
        longer = list(itertools.product(pieces, string.ascii_lowercase))[: vocabulary - len(tokens)]
        pieces = ["".join(pair) for pair in longer]
        merges += longer
        tokens += pieces
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", padding_side="left")


@dataclass(frozen=True)
class Limits:
    """Limits of a device: floating-point operations and bytes per second."""

    flops: float
    bandwidth: float


def best_device() -> tuple[torch.device, torch.dtype]:
    """The device and data type of the measurement: a GPU in bf16 if there is one."""
    if torch.cuda.is_available():
        return torch.device("cuda"), torch.bfloat16
    return torch.device("cpu"), torch.float32


def limits_of(device: torch.device, dtype: torch.dtype) -> Limits:
    """Measure a large matrix product and a large copy. The copy reads and writes each byte."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(size, size, device=device, dtype=dtype), torch.randn(size, size, device=device, dtype=dtype)
    seconds = min(_seconds(lambda: a @ b, device) for _ in range(8))
    flops = 2 * size**3 / seconds
    # Several times the size of a cache.
    source = torch.empty(2**31 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = min(_seconds(lambda: target.copy_(source), device) for _ in range(8))
    return Limits(flops, 2 * source.numel() / seconds)


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work. Kernels run asynchronously, and a clock would stop too early."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def now(device: torch.device) -> float:
    """The time in seconds, after the device has finished its work.

    On a CPU it is the CPU time of this process, which excludes other jobs on the machine.
    """
    synchronize(device)
    return time.perf_counter() if device.type == "cuda" else time.process_time()


def _seconds(run, device: torch.device) -> float:
    start = now(device)
    run()
    return now(device) - start
