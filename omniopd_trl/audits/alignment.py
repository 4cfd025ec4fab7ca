# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Between the student's tokens and text: of a chunk, and of the rollouts that are compared with it."""

from collections.abc import Sequence
from functools import cached_property

from omniopd_trl.audits.types import Tokenizer
from omniopd_trl.method.chunks import Chunk
from omniopd_trl.teachers.base import Rollout, common_prefix_length

# What a decoder writes for a part of a character.
PARTIAL_CHARACTER = "\ufffd"

# Tokens that are decoded again before new ones: decoders look at their neighbours only.
DECODING_CONTEXT = 8


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
        texts = self._texts_up_to(token_ids, sorted({end for chunk in chunks for end in (chunk.start, chunk.end)}))
        pairs = []
        for chunk in chunks:
            prefix, whole = texts[chunk.start], texts[chunk.end]
            if not whole.startswith(prefix):  # tokenizers whose decoding depends on what follows
                prefix = prefix[: common_prefix_length(prefix, whole)]
            pairs.append((prefix, whole[len(prefix) :]))
        return pairs

    def _texts_up_to(self, token_ids: list[int], ends: Sequence[int]) -> dict[int, str]:
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

    def length_of(self, token_ids: list[int], chunk: Chunk, text: str) -> int:
        """How many student tokens a rollout may have, to be as long as the chunk.

        That is the chunk's own number, unless the tokenizer begins every text with a space that nobody wrote, as
        those of Llama 2 and Mistral do. Then a rollout, which is encoded by itself, has other tokens than the same
        text has within a trajectory, most often one more, and a teacher that repeats the student word for word would
        lose its last token. So the chunk's text is encoded by itself, too. Its tokens without a text, such as the end
        of the sequence, count as before.

        Args:
            token_ids: the completion.
            chunk: where the chunk stands in it.
            text: its text, from [`split_texts`].
        """
        if not self._prepends_space:
            return chunk.end - chunk.start
        special = set(self.tokenizer.all_special_ids)
        without_text = sum(token_id in special for token_id in token_ids[chunk.start : chunk.end])
        return len(self.tokenizer([text], add_special_tokens=False)["input_ids"][0]) + without_text

    @cached_property
    def _prepends_space(self) -> bool:
        """Whether a text by itself is encoded as if a space stood before it: then "a a" is twice the same."""
        (token_ids,) = self.tokenizer(["a a"], add_special_tokens=False)["input_ids"]
        half = len(token_ids) // 2
        return bool(token_ids[:half] == token_ids[half:])

    def cut(self, rollouts: Sequence[Rollout], num_tokens: int) -> tuple[list[str], int]:
        """Cut rollouts to `num_tokens` student tokens ([`length_of`]): a teacher token is not a student token.

        Returns:
            The texts, and how many of them the teacher was cut off in before they had that many tokens.
        """
        if not rollouts:
            return [], 0
        encoded = self.tokenizer([rollout.text for rollout in rollouts], add_special_tokens=False)["input_ids"]
        texts, short = [], 0
        for rollout, token_ids in zip(rollouts, encoded, strict=True):
            short += rollout.finish_reason == "length" and len(token_ids) < num_tokens
            texts.append(rollout.text if len(token_ids) <= num_tokens else self._decode(token_ids[:num_tokens]))
        return texts, short

    def _decode(self, token_ids: list[int], strip: bool = True) -> str:
        """Text of tokens; with `strip`, without a character at its end that continues in the next token."""
        text: str = self.tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text.rstrip(PARTIAL_CHARACTER) if strip else text
