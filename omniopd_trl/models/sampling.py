# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Sampling with a seed per row, which gives the same completion in any batch."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import (
    LogitsProcessor,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from omniopd_trl.errors import NonFiniteError
from omniopd_trl.method import SamplingFilters


class SeededSampling(LogitsProcessor):
    """Chooses the next token of each row by the row's own random numbers. Use it with greedy decoding.

    The token is the one in whose interval of the cumulative distribution a uniform number falls. A row uses one number
    per token, in order. It therefore depends neither on the other rows nor, up to rounding, on the width of the batch.

    Args:
        seeds: seed of each of the `B` rows.
        max_tokens: maximum number of tokens per row.
        temperature: sampling temperature, above 0.
        filters: what removes unlikely tokens; `None` for nothing.

    Raises:
        NonFiniteError: when the logits of a row give no distribution.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        max_tokens: int,
        temperature: float = 1.0,
        filters: SamplingFilters | None = None,
    ):
        filters = filters or SamplingFilters()
        self._warpers: list[LogitsProcessor] = []
        if temperature != 1.0:
            self._warpers.append(TemperatureLogitsWarper(temperature))
        if filters.top_k > 0:
            self._warpers.append(TopKLogitsWarper(filters.top_k))
        if filters.top_p < 1.0:
            self._warpers.append(TopPLogitsWarper(filters.top_p))
        if filters.min_p > 0:
            self._warpers.append(MinPLogitsWarper(filters.min_p))
        # Always on the CPU: the generators of devices differ.
        rows = [torch.rand(max_tokens, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in seeds]
        self._uniforms = torch.stack(rows)  # (B, max_tokens)
        self._start: int | None = None

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        if self._start is None:
            self._start = input_ids.size(1)
        scores = scores.float()
        for warp in self._warpers:
            scores = warp(input_ids, scores)
        # Sums of a large vocabulary lose small probabilities in single precision.
        cumulative = scores.softmax(-1).double().cumsum(-1)  # (B, V)
        total = cumulative[:, -1:]
        if not total.isfinite().all():
            raise NonFiniteError("The model's next-token probabilities are not finite. Check its weights and dtype.")
        column = input_ids.size(1) - self._start
        point = self._uniforms[:, column, None].to(cumulative.device) * total
        chosen = torch.searchsorted(cumulative, point, right=True).clamp(max=scores.size(-1) - 1)
        return torch.full_like(scores, -torch.inf).scatter(-1, chosen, 0.0)
