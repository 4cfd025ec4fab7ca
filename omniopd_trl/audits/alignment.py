# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Conversion between student tokens and text, for chunks and for the rollouts that are compared with them."""

from collections.abc import Sequence
from itertools import islice, product

import numpy as np

from omniopd_trl.audits.types import Tokenizer
from omniopd_trl.method.chunks import Chunk
from omniopd_trl.teachers.base import Rollout, common_prefix_length

# Decoders write this for an incomplete character.
PARTIAL_CHARACTER = "\ufffd"

# Tokens before new ones that are decoded again: the text of a token depends on nearby tokens only.
DECODING_CONTEXT = 8

# What follows a word without a space.
CLOSING = tuple(".,;:!?)]}%…。，、；：！？）")

# The text of a chunk, encoded alone, may begin with other tokens. The first tokens are compared. This many equal ones
# in a row show that the rest is the same.
FIRST_TOKENS, EQUAL_TOKENS = 8, 4
_SHIFTS = sorted(product(range(FIRST_TOKENS), repeat=2), key=sum)


class Alignment:
    """Converts chunks to text, and cuts rollouts to the length of their chunk.

    Args:
        tokenizer: the student's tokenizer.
        keep_special_tokens: whether the text before a chunk keeps the special tokens that the student wrote.
    """

    def __init__(self, tokenizer: Tokenizer, keep_special_tokens: bool = False):
        self.tokenizer = tokenizer
        self.keep_special_tokens = keep_special_tokens

    def split_texts(
        self, token_ids: list[int], chunks: Sequence[Chunk], prompt_ids: Sequence[int] = ()
    ) -> list[tuple[str, str]]:
        """The text before each chunk, and the text of the chunk.

        A chunk may begin or end inside a character of several bytes, and a part of a character decodes to a
        replacement character. The prefix ends before such a character and the chunk begins with it, so the two always
        join to the student's text.

        Args:
            token_ids: the completion.
            chunks: where the chunks are in it.
            prompt_ids: the prompt before it. The first token of a text loses its space with the tokenizers of Llama 2
                and Mistral, so the completion is decoded after the last tokens of the prompt.
        """
        # An array, because transformers checks the type of each token of a list.
        before = list(prompt_ids[-DECODING_CONTEXT:])
        ids, first = np.asarray([*before, *token_ids]), len(before)
        texts = self._texts_up_to(ids, sorted({first + end for chunk in chunks for end in (chunk.start, chunk.end)}))
        prompt = self._decode(before) if before else ""
        if not all(text.startswith(prompt) for text in texts.values()):
            return self.split_texts(token_ids, chunks)
        pairs = []
        for chunk in chunks:
            prefix, whole = (texts[first + end][len(prompt) :] for end in (chunk.start, chunk.end))
            if not whole.startswith(prefix):  # tokenizers whose decoding depends on what follows
                prefix = prefix[: common_prefix_length(prefix, whole)]
            text = whole[len(prefix) :]
            if self.keep_special_tokens:
                marked = self._decode(ids[: first + chunk.start], special=True)
                prefix = marked.removeprefix(self._decode(before, special=True))
            pairs.append((prefix, text))
        return pairs

    def _texts_up_to(self, token_ids: np.ndarray, ends: Sequence[int]) -> dict[int, str]:
        """The text of the first `end` tokens, for each of `ends`, in ascending order.

        Each text extends the one before. The last tokens of that one are decoded together with the new ones, and their
        own text is removed from the result. If the texts do not match the text of all tokens, each one is decoded as a
        whole.
        """
        texts: dict[int, str] = {}
        known, text = 0, ""  # the first `known` tokens have this text, and its last character is complete
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
        """Cut each rollout to the number of student tokens of its chunk.

        White space before a rollout does not affect the cut, because chat services trim it and similarities ignore it.
        A rollout is encoded with the white space of its chunk instead.

        Tokens of the chunk without text, such as the end of the sequence, count as well. The text of the chunk,
        encoded alone, may begin with more or fewer tokens than in the trajectory (`_extra_tokens`). The limit of its
        rollouts changes by this number, so a rollout that repeats the student is cut where the chunk ends.

        Args:
            token_ids: the completion.
            chunks: where the chunks are in it, at least one.
            texts: the text of each chunk, from [`split_texts`].
            rollouts: the rollouts of each chunk.

        Returns:
            The texts of each chunk's rollouts, and the number of rollouts of all chunks that ended at the teacher's
            token limit before they had enough student tokens.
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
            # Teachers do not repeat invalid bytes, and a replacement character has more tokens than the bytes.
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

    def continuations(
        self,
        token_ids: list[int],
        chunks: Sequence[Chunk],
        texts: Sequence[str],
        rollouts: Sequence[Sequence[str]],
        prompt_ids: Sequence[int],
        max_tokens: int,
    ) -> list[list[tuple[int, ...] | None]]:
        """The first tokens of each rollout, as the student's tokens that follow those before its chunk.

        Rollouts keep their white space. Services may trim the space before a continuation: if no rollout begins with
        one, a rollout that begins a word gets the white space of its chunk, as in [`cut`].

        The text before a chunk is encoded alone and together with the rollout. A rollout is left out if the encoding
        changes before it, as when the tokenizer joins its first letters with the last ones of the student, if the
        chunk begins inside a character, or if the rollout spells a special token.

        Args:
            token_ids: the completion.
            chunks: where the chunks are in it.
            texts: the text of each chunk, from [`split_texts`].
            rollouts: the rollouts of each chunk, from [`cut`].
            prompt_ids: the prompt before the completion.
            max_tokens: number of tokens of each rollout, at most. It has no more than its chunk in any case.

        Returns:
            For each chunk, the tokens of each rollout; `None` for one that is left out. A rollout of fewer tokens has
            all of them, and no end token.
        """
        if not any(rollouts):
            return [[] for _ in chunks]
        ids, first = np.asarray([*prompt_ids[-DECODING_CONTEXT:], *token_ids]), len(prompt_ids[-DECODING_CONTEXT:])
        ends = [first + chunk.start for chunk in chunks]
        before = [self._decode(ids[max(0, end - DECODING_CONTEXT) : end], strip=False, special=True) for end in ends]
        is_trimmed = not any(rollout.startswith(" ") for of_chunk in rollouts for rollout in of_chunk)
        joined = [
            context + (_with_space_of(text, rollout) if is_trimmed and _lacks_space(context, rollout) else rollout)
            for context, text, of_chunk in zip(before, texts, rollouts, strict=True)
            for rollout in of_chunk
        ]
        encoded = self.tokenizer([*before, *joined], add_special_tokens=False)["input_ids"]
        alone, rest = encoded[: len(before)], iter(encoded[len(before) :])
        found: list[list[tuple[int, ...] | None]] = []
        for chunk, context, known, of_chunk in zip(chunks, before, alone, rollouts, strict=True):
            size = min(max_tokens, chunk.end - chunk.start)
            following = [self._following(known, tokens, size) for tokens in islice(rest, len(of_chunk))]
            found.append([None] * len(of_chunk) if context.endswith(PARTIAL_CHARACTER) else following)
        return found

    def texts_of(self, rollouts: Sequence[Sequence[int] | None]) -> list[str | None]:
        """The texts of the tokens that [`continuations`] returns for a chunk."""
        return [None if tokens is None else self._decode([*tokens], strip=False) for tokens in rollouts]

    def _following(self, known: list[int], token_ids: list[int], max_tokens: int) -> tuple[int, ...] | None:
        """What follows the known tokens; `None` if the tokens do not begin with them, or a special one follows."""
        new = token_ids[len(known) :][:max_tokens]
        is_text = self._decode(new, strip=False) == self._decode(new, strip=False, special=True)
        return tuple(new) if is_text and token_ids[: len(known)] == known else None

    def _decode(self, token_ids: list[int] | np.ndarray, strip: bool = True, special: bool = False) -> str:
        """Text of tokens. With `strip`, an incomplete character at the end is removed."""
        text: str = self.tokenizer.decode(
            token_ids, skip_special_tokens=not special, clean_up_tokenization_spaces=False
        )
        return text.rstrip(PARTIAL_CHARACTER) if strip else text


def _space_before(text: str) -> str:
    return text[: len(text) - len(text.lstrip())]


def _with_space_of(chunk: str, rollout: str) -> str:
    """A rollout with the leading white space of a chunk, unless the chunk is white space only."""
    return _space_before(chunk) + rollout.lstrip() if chunk.strip() else rollout


def _lacks_space(before: str, rollout: str) -> bool:
    """Whether white space before a rollout may have been trimmed: not before punctuation, nor inside a number."""
    is_number = before[-1:].isdigit() and rollout[:1].isdigit()
    return bool(rollout) and not (_space_before(rollout) or rollout.startswith(CLOSING) or is_number)


def _extra_tokens(tokens: list[int], alone: list[int]) -> int:
    """How many more tokens a chunk's text has at its beginning when it is encoded alone.

    The tokenizers of Llama 2 and Mistral add a space before every text, and a chunk may begin inside a character or a
    word. Only the first tokens are compared. Later differences do not count: there the student's tokens are not the
    tokenizer's, or have no text.

    Args:
        tokens: token ids of the chunk, from the trajectory.
        alone: token ids of the chunk's text, encoded alone.
    """
    for skipped, added in _SHIFTS:
        following = tokens[skipped : skipped + EQUAL_TOKENS]
        if following and following == alone[added : added + EQUAL_TOKENS]:
            return added - skipped
    return 0
