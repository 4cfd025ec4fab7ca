# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Tiny models and tokenizers, which are created locally: no test needs a network.

The student and the teacher differ in tokenizer, chat template and size, since they exchange only text.
"""

import gc
import os

# Before transformers, datasets or huggingface_hub are imported: they read these once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.corpus import STUDENT_LINES, TEACHER_LINES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, by the limits of time that they have: with `-n 2` others then run beside them."""
    items.sort(key=lambda item: -max((mark.args[0] for mark in item.iter_markers("timeout")), default=0))


def pytest_collection_finish() -> None:
    """Leave what the imports have created out of garbage collections: each training collects everything.

    With torch and TRL imported, a collection would take a fifth of the time of a test that trains.
    """
    gc.collect()
    gc.freeze()


# ChatML, as in Qwen: the end of a turn is the end of a sequence.
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BRACKETS = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] | upper }}] {{ message['content'] }} [END]"
    "{% endfor %}{% if add_generation_prompt %}[ASSISTANT] {% endif %}"
)


def _byte_level_tokenizer(
    lines: list[str], vocab_size: int, special_tokens: list[str], chat_template: str, **names: str
) -> "PreTrainedTokenizerFast":
    """A byte-level BPE tokenizer: every text can be encoded, and decodes to itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        lines,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=special_tokens,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=chat_template,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=256,
        **names,
    )


def _save_tiny_model(path: Path, tokenizer: "PreTrainedTokenizerFast", seed: int, **overrides: Any) -> Path:
    """Save a Qwen3 of a few thousand float32 weights, with its tokenizer, and return the folder."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "dtype": "float32",
        # Larger than the usual 0.02: logits of such a narrow model would be nearly flat, and a mistake in the
        # loss would hide in numbers that all look alike.
        "initializer_range": 0.3,
    }
    settings.update(overrides)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(Qwen3Config(**settings))
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tiny_tokenizer() -> "PreTrainedTokenizerFast":
    """The student's tokenizer: byte-level BPE, 300 tokens, ChatML, `<|im_end|>` ends a turn."""
    return _byte_level_tokenizer(
        STUDENT_LINES,
        300,
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        CHATML,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )


@pytest.fixture(scope="session")
def tiny_teacher_tokenizer() -> "PreTrainedTokenizerFast":
    """The teacher's tokenizer: other merges, other size, a `bos`, and another chat template."""
    return _byte_level_tokenizer(
        TEACHER_LINES,
        330,
        ["<pad>", "<s>", "[USER]", "[ASSISTANT]", "[SYSTEM]", "[END]"],
        BRACKETS,
        bos_token="<s>",
        eos_token="[END]",
        pad_token="<pad>",
    )


@pytest.fixture(scope="session")
def make_tiny_model(tmp_path_factory, tiny_tokenizer) -> Callable[..., Path]:
    """A function that saves another tiny student: `make_tiny_model(seed=1, tie_word_embeddings=False)`.

    Keyword arguments other than `seed` and `tokenizer` go to `Qwen3Config`.
    """

    def make(seed: int = 0, tokenizer: Any = None, **overrides: Any) -> Path:
        path = tmp_path_factory.mktemp("model")
        return _save_tiny_model(path, tiny_tokenizer if tokenizer is None else tokenizer, seed, **overrides)

    return make


@pytest.fixture(scope="session")
def tiny_model_dir(make_tiny_model) -> Path:
    """The student: Qwen3 with 300 tokens, hidden size 32, two layers, tied embeddings, 256 positions."""
    return make_tiny_model(seed=0)


@pytest.fixture(scope="session")
def tiny_teacher_dir(make_tiny_model, tiny_teacher_tokenizer) -> Path:
    """The teacher: another tokenizer, wider, other weights."""
    return make_tiny_model(seed=1, tokenizer=tiny_teacher_tokenizer, hidden_size=48, intermediate_size=96, head_dim=12)
