# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Between the student's tokens and text: of a chunk, and of the rollouts that are compared with it."""

from collections.abc import Sequence
from functools import cached_property

from omniopd_trl.audits.types import Tokenizer
from omniopd_trl.method.chunks import Chunk
from omniopd_trl.teachers.base import Rollout


class Alignment:
    """Chunks as text, and rollouts as long as their chunk.

    Args:
        tokenizer: the student's tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer

    def split_text(self, token_ids: list[int], chunk: Chunk) -> tuple[str, str]:
        """Text before the chunk, and text of the chunk.

        A chunk may begin or end inside a character of several bytes, whose decoding is then a replacement character.
        The prefix ends before such a character and the chunk begins with it, so the two always join to the student's
        own text.
        """
        whole = self._decode(token_ids[: chunk.end])
        prefix = self._decode(token_ids[: chunk.start])
        if not whole.startswith(prefix):  # tokenizers whose decoding depends on what follows
            prefix = _common_prefix(prefix, whole)
        return prefix, whole[len(prefix) :]

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
            text: its text, from [`split_text`].
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

    def _decode(self, token_ids: list[int]) -> str:
        text = self.tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text.rstrip("\ufffd")  # the beginning of a character that goes on in the next token


def _common_prefix(first: str, second: str) -> str:
    for n, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return first[:n]
    return min(first, second, key=len)
