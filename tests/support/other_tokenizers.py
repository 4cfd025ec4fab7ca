# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Tokenizers of other families than those of the tiny models."""

import json
from copy import deepcopy

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests.support.corpus import STUDENT_LINES


def llama_style_tokenizer(normalizer):
    """BPE over "▁", where a space is prepended to every text by the normalizer, as in Llama 2, or by the splitting.

    Characters that it does not know are bytes.
    """
    metaspace = pre_tokenizers.Metaspace(prepend_scheme="always")
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer, trained.pre_tokenizer = normalizer, metaspace
    special = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trained.train_from_iterator(
        STUDENT_LINES, trainers.BpeTrainer(vocab_size=556, special_tokens=special, show_progress=False)
    )
    model = json.loads(trained.to_str())["model"]
    # Built again: the trainer's special tokens would be found in texts, and skipped when they are decoded.
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = Tokenizer(models.BPE(model["vocab"], merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, metaspace
    if normalizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    # As these tokenizers decode: the first space is removed, whether it was written or not.
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


def llama_2():
    """`llama_style_tokenizer` with the normalizer of Llama 2."""
    return llama_style_tokenizer(normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]))


def word_piece():
    """As BERT's: a space before each token that does not begin with "##", and none before a full stop."""
    words = ["[UNK]", "[SEP]", "the", "angle", "##s", "are", "##n", "'", "t", ".", ",", "12", "##0", "é", "漢", "##字"]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", sep_token="[SEP]")


def metaspace():
    """As T5's: the decoder takes away the first space."""
    tokenizer = llama_style_tokenizer(None)
    tokenizer.backend_tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def appending(tokenizer, before="", after="<|im_end|>"):
    """A copy that puts special tokens before and after every text, as its post-processor says."""
    tokenizer = deepcopy(tokenizer)
    single = f"{before} $A {after}".strip()
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in (before, after) if token]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    return tokenizer


# As gpt-oss: the answer begins with a channel, whose name is between special tokens.
CHANNELS = (
    "{% for message in messages %}<|start|>{{ message['role'] }}"
    "{% if message['role'] == 'assistant' %}<|channel|>final{% endif %}<|message|>{{ message['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)


def channels(tokenizer):
    """A copy with the special tokens and the chat template of gpt-oss."""
    tokenizer = deepcopy(tokenizer)
    marks = ["<|start|>", "<|channel|>", "<|message|>", "<|end|>"]
    tokenizer.add_tokens([AddedToken(mark, special=True) for mark in marks], special_tokens=True)
    tokenizer.chat_template = CHANNELS
    return tokenizer
