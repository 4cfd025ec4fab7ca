# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Between the student's tokens and text: of a chunk, and of the rollouts that are compared with it."""

from collections.abc import Sequence
from itertools import product

import numpy as np

from omniopd_trl.audits.types import Tokenizer
from omniopd_trl.method.chunks import Chunk
from omniopd_trl.teachers.base import Rollout, common_prefix_length

# What a decoder writes for a part of a character.
PARTIAL_CHARACTER = "\ufffd"

# Tokens that are decoded again before new ones: decoders look at their neighbours only.
DECODING_CONTEXT = 8

# A chunk's text that is encoded by itself may begin with other tokens. This many are compared, and equal ones in a row
# show that the rest is the same.
FIRST_TOKENS, EQUAL_TOKENS = 8, 4
_SHIFTS = sorted(product(range(FIRST_TOKENS), repeat=2), key=sum)


class Alignment:
    """Chunks as text, and rollouts as long as their chunk.

    Args:
        tokenizer: the student's tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer

    def split_texts(self, token_ids: list[int], chunks: Sequence[Chunk]) -> list[tuple[str, str]]:
        """Text before each chunk, and text of the chunk.

        A chunk may begin or end inside a character of several bytes, whose decoding is then a replacement character.
        The prefix ends before such a character and the chunk begins with it, so the two always join to the student's
        own text.

        Args:
            token_ids: the completion.
            chunks: where the chunks are in it.
        """
        # An array: of a list, transformers checks the type of each token before it decodes.
        texts = self._texts_up_to(
            np.asarray(token_ids), sorted({end for chunk in chunks for end in (chunk.start, chunk.end)})
        )
        pairs = []
        for chunk in chunks:
            prefix, whole = texts[chunk.start], texts[chunk.end]
            if not whole.startswith(prefix):  # tokenizers whose decoding depends on what follows
                prefix = prefix[: common_prefix_length(prefix, whole)]
            pairs.append((prefix, whole[len(prefix) :]))
        return pairs

    def _texts_up_to(self, token_ids: np.ndarray, ends: Sequence[int]) -> dict[int, str]:
        """The text of the first `end` tokens, for each of `ends`, in ascending order.

        Each text continues the one before: its last tokens and the new ones are decoded together, and what the last
        ones give by themselves is taken off. If that does not lead to the text of all tokens, each is decoded whole.
        """
        texts: dict[int, str] = {}
        known, text = 0, ""  # so many tokens have this text, which ends with a whole character
        for end in ends:
            start = max(0, known - DECODING_CONTEXT)
            context = self._decode(token_ids[start:known])
            piece = self._decode(token_ids[start:end], strip=False)
            if not piece.startswith(context):
                break
            piece = text + piece[len(context) :]
            texts[end] = piece.rstrip(PARTIAL_CHARACTER)
            if texts[end] == piece:
                known, text = end, piece
        if len(texts) < len(ends) or texts[ends[-1]] != self._decode(token_ids[: ends[-1]]):
            return {end: self._decode(token_ids[:end]) for end in ends}
        return texts

    def cut(
        self,
        token_ids: list[int],
        chunks: Sequence[Chunk],
        texts: Sequence[str],
        rollouts: Sequence[Sequence[Rollout]],
    ) -> tuple[list[list[str]], int]:
        """Cut rollouts to as many student tokens as their chunk has: a teacher token is not a student token.

        The white space before a rollout does not change where it is cut, since chat services trim it and similarities
        ignore it: a rollout is encoded with the white space of its chunk instead.

        The chunk's tokens without a text, such as the end of the sequence, count as well. The chunk's text by itself
        may begin with more or fewer tokens than within the trajectory (`_extra_tokens`), and rollouts may have as many
        more or fewer: a rollout that repeats the student is cut where the chunk ends.

        Args:
            token_ids: the completion.
            chunks: where the chunks are in it, at least one.
            texts: the text of each chunk, from [`split_texts`].
            rollouts: the rollouts of each chunk.

        Returns:
            The texts of each chunk's rollouts, and how many rollouts of all chunks were cut off by the teacher before
            they had enough tokens.
        """
        aligned = [
            _with_space_of(text, rollout.text)
            for text, of_chunk in zip(texts, rollouts, strict=True)
            for rollout in of_chunk
        ]
        encoded = iter(self.tokenizer([*texts, *aligned], add_special_tokens=False)["input_ids"])
        lengths = []
        for chunk, text in zip(chunks, texts, strict=True):
            tokens, alone = token_ids[chunk.start : chunk.end], next(encoded)
            # Invalid bytes are no text that a teacher repeats, and a replacement character has more tokens than they.
            extra = 0 if PARTIAL_CHARACTER in text else _extra_tokens(tokens, alone)
            lengths.append(len(tokens) + extra)
        kept: list[list[str]] = []
        num_short = 0
        for length, of_chunk in zip(lengths, rollouts, strict=True):
            kept.append([])
            for rollout in of_chunk:
                tokens, text = next(encoded), rollout.text
                num_short += rollout.finish_reason == "length" and len(tokens) < length
                if len(tokens) > length:
                    text = _space_before(text) + self._decode(tokens[:length]).lstrip()
                kept[-1].append(text)
        return kept, num_short

    def _decode(self, token_ids: list[int] | np.ndarray, strip: bool = True) -> str:
        """Text of tokens; with `strip`, without a character at its end that continues in the next token."""
        text: str = self.tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text.rstrip(PARTIAL_CHARACTER) if strip else text


def _space_before(text: str) -> str:
    return text[: len(text) - len(text.lstrip())]


def _with_space_of(chunk: str, rollout: str) -> str:
    """A rollout with the white space at the beginning of a chunk, unless the chunk is nothing else."""
    return _space_before(chunk) + rollout.lstrip() if chunk.strip() else rollout


def _extra_tokens(tokens: list[int], alone: list[int]) -> int:
    """How many tokens more a chunk's text has when it is encoded by itself, because of its beginning.

    The tokenizers of Llama 2 and Mistral begin every text with a space that nobody wrote, and a chunk may begin inside
    a character or a word. Only the first tokens count: others differ because the student does not write what the
    tokenizer would, or have no text, and are as many as the student wrote.

    Args:
        tokens: the chunk's.
        alone: those of its text.
    """
    for skipped, added in _SHIFTS:
        following = tokens[skipped : skipped + EQUAL_TOKENS]
        if following and following == alone[added : added + EQUAL_TOKENS]:
            return added - skipped
    return 0
