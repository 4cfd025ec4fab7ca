# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Keys and values in buffers with room for more tokens, for generation with transformers.

The cache of transformers concatenates: each new token copies all keys and values of its rows.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, DynamicLayer

# Tokens that a buffer has room for when it is created. It is copied to a larger one when it is full.
ROOM = 64


class GrowingLayer(DynamicLayer):
    """A `DynamicLayer` that writes new keys and values behind the others, and copies these once in `ROOM` tokens.

    `keys` and `values` are views of its buffers. What replaces them, such as a choice of rows, is copied to new
    buffers with the next token.
    """

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self._buffers: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}  # and the view that is `keys` or `values`

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add keys and values of new tokens, `(B, heads, tokens, size)`, and return those of all tokens."""
        if torch.is_grad_enabled():  # a backward allows no write to the tensors that it needs
            joined: tuple[torch.Tensor, torch.Tensor] = super().update(key_states, value_states, *args, **kwargs)
            return joined
        start = self.get_seq_length()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._append("keys", start, key_states)
        self.values = self._append("values", start, value_states)
        return self.keys, self.values

    def _append(self, name: str, start: int, new: torch.Tensor) -> torch.Tensor:
        kept, end = getattr(self, name), start + new.shape[-2]
        buffer, view = self._buffers.get(name, (new, None))
        if view is not kept or end > buffer.shape[-2]:
            buffer = new.new_empty(*new.shape[:-2], end + ROOM, new.shape[-1])
            if start:
                buffer[..., :start, :] = kept
        buffer[..., start:end, :] = new
        self._buffers[name] = buffer, buffer[..., :end, :]
        return self._buffers[name][1]

    def offload(self) -> None:
        """Move keys and values to the CPU, and free the buffers."""
        self._buffers.clear()
        super().offload()


@contextmanager
def growing_cache() -> Iterator[None]:
    """Context in which new caches for full attention are made of [`GrowingLayer`]. It holds for all threads."""
    DYNAMIC_LAYER_TYPE_MAPPING["full_attention"] = GrowingLayer
    try:
        yield
    finally:
        DYNAMIC_LAYER_TYPE_MAPPING["full_attention"] = DynamicLayer
