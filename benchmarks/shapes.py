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
"""Models of random weights with the sizes of real ones, a tokenizer for any vocabulary, and what a device can do."""

import itertools
import string
import time
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

QWEN_VOCABULARY = 151_936


@dataclass(frozen=True)
class Shape:
    """The sizes of a Qwen3 model, and of the batch that it is measured with."""

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tokens: tuple[int, ...]  # of a completion, one run each
    micro_batch: int
    micro_batches: int

    def model(self, device: torch.device, dtype: torch.dtype) -> Qwen3ForCausalLM:
        """A model of random weights, made on the device."""
        config = Qwen3Config(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=40_960,
            tie_word_embeddings=True,
            eos_token_id=None,
            dtype=dtype,
        )
        torch.manual_seed(0)
        with torch.device(device):
            return Qwen3ForCausalLM(config).to(dtype)

    @property
    def layer_weights(self) -> int:
        """Weights of matrices in all layers; each token meets each of them once in a forward."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def head_weights(self) -> int:
        return self.vocabulary * self.hidden

    def forward_flops(self, length: int) -> float:
        """Of the layers on one sequence, causal attention included, without the head."""
        attention = 4 * self.layers * self.heads * self.head_dim * length * length / 2
        return 2.0 * self.layer_weights * length + attention

    def cache_bytes(self, length: float, itemsize: int) -> float:
        """Keys and values of one sequence."""
        return 2.0 * self.layers * self.kv_heads * self.head_dim * length * itemsize


SHAPES = {
    "small": Shape(32_768, 256, 768, 4, 4, 2, 64, tokens=(512,), micro_batch=2, micro_batches=2),
    "qwen3-1.7b": Shape(
        QWEN_VOCABULARY, 2048, 6144, 28, 16, 8, 128, tokens=(2048, 8192, 20_000), micro_batch=1, micro_batches=2
    ),
    "qwen3-4b": Shape(
        QWEN_VOCABULARY, 2560, 9728, 36, 32, 8, 128, tokens=(2048, 8192, 20_000), micro_batch=1, micro_batches=2
    ),
}


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
    """What a device can do at most: floating-point operations and bytes per second."""

    flops: float
    bandwidth: float
    source: str


# Dense bf16 arithmetic and memory bandwidth from the makers' data sheets, by what the device calls itself. The first
# that fits counts.
CARDS = {
    "H200": (989e12, 4.8e12),
    "H100 PCIe": (756e12, 2.0e12),
    "H100": (989e12, 3.35e12),
    "A100-SXM4-80GB": (312e12, 2.04e12),
    "A100 80GB PCIe": (312e12, 1.94e12),
    "A100": (312e12, 1.56e12),
}


def limits_of(device: torch.device, dtype: torch.dtype) -> Limits:
    """From the data sheet of a known card, or else measured: a large matrix product, and a large copy."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for card, (flops, bandwidth) in CARDS.items():
            if card in name:
                return Limits(flops, bandwidth, f"data sheet of the {card}")
    size = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(size, size, device=device, dtype=dtype), torch.randn(size, size, device=device, dtype=dtype)
    seconds = min(_seconds(lambda: a @ b, device) for _ in range(8))
    flops = 2 * size**3 / seconds
    source = torch.empty(2**28 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = min(_seconds(lambda: target.copy_(source), device) for _ in range(8))
    return Limits(flops, 2 * source.numel() / seconds, "measured: a matrix product, a copy")


def synchronize(device: torch.device) -> None:
    """Wait for what was sent to the device: a clock would otherwise show when it was sent."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def now(device: torch.device) -> float:
    """Seconds, when what was sent to the device is done.

    On a CPU they are the processor's, of this process: other jobs may run at the same time, and theirs do not count.
    """
    synchronize(device)
    return time.perf_counter() if device.type == "cuda" else time.process_time()


def _seconds(run, device: torch.device) -> float:
    start = now(device)
    run()
    return now(device) - start
