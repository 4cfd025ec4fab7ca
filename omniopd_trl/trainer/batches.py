# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Batches of trajectories: TRL's format, the packed format of the forward passes, and the split into micro-batches."""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn
from trl.trainer.utils import flush_left

# Keys of TRL's batch that the forward passes read. Prompts are `(B, P)`, the others `(B, T)`.
TOKEN_KEYS = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "audited_mask", "weights")


@dataclass(frozen=True)
class PackedBatch:
    """A batch with all padding on the right, cut to the longest row.

    TRL pads prompts on the left and completions on the right. Concatenated, a row would start at any position and hold
    padding twice. Here every row starts at position 0, where models with absolute positions expect it.

    Attributes:
        input_ids: `(B, L)`.
        attention_mask: `(B, L)`.
        targets: `(B, L - 1)`, the token that each position predicts.
        completion: `(B, L - 1)`, true where the target is a completion token.
        audited: `(B, L - 1)`, true where the target lies in an audited chunk.
        weights: `(B, L - 1)`, the chunk's weight on audited targets and 0 elsewhere.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    targets: torch.Tensor
    completion: torch.Tensor
    audited: torch.Tensor
    weights: torch.Tensor

    @classmethod
    def of(cls, batch: dict[str, Any], pad_token_id: int, pad_to_multiple_of: int | None = None) -> "PackedBatch":
        """Join prompts and completions.

        Args:
            batch: a batch with the keys `TOKEN_KEYS`.
            pad_token_id: token that pads rows to a multiple of `pad_to_multiple_of`.
            pad_to_multiple_of: the rows are padded to a multiple of this length; `None` for no padding.
        """
        prompt_padding = torch.zeros_like(batch["prompt_mask"])
        mask, input_ids, completion, audited, weights = flush_left(
            torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
            torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
            torch.cat([prompt_padding, batch["completion_mask"]], dim=1),
            torch.cat([prompt_padding, batch["audited_mask"].to(prompt_padding.dtype)], dim=1),
            torch.cat([prompt_padding.float(), batch["weights"]], dim=1),
        )
        if pad_to_multiple_of is not None:
            padding = -mask.size(1) % pad_to_multiple_of
            mask, completion, audited, weights = (
                nn.functional.pad(x, (0, padding)) for x in (mask, completion, audited, weights)
            )
            input_ids = nn.functional.pad(input_ids, (0, padding), value=pad_token_id)
        return cls(input_ids, mask, input_ids[:, 1:], completion[:, 1:].bool(), audited[:, 1:].bool(), weights[:, 1:])

    @property
    def unaudited(self) -> torch.Tensor:
        """`(B, L - 1)`, true where the target is a completion token outside of every audited chunk."""
        return self.completion & ~self.audited

    def select(self, rows: torch.Tensor) -> "PackedBatch":
        """The selected rows as a batch."""
        return PackedBatch(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})


def rows_by_length(batch: dict[str, Any], size: int) -> list[list[int]]:
    """Indices of the rows in groups of similar length, the longest first, which keeps padding small."""
    lengths = batch["prompt_mask"].sum(1) + batch["completion_mask"].sum(1)
    return [rows.tolist() for rows in lengths.argsort(descending=True).split(size)]


def group_by_length(batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Regroup the rows of all micro-batches by length, the longest first, which keeps padding small.

    All micro-batches contribute to one optimizer step, so their order does not matter. Rows that were scored and sent
    to the teacher together end up in the same micro-batch, which then waits for these audits only.
    """
    lengths = torch.cat([batch["prompt_mask"].sum(1) + batch["completion_mask"].sum(1) for batch in batches])
    order: list[int] = lengths.argsort(descending=True, stable=True).tolist()
    size = len(batches[0]["prompt_mask"])
    grouped: list[dict[str, Any]] = [{} for _ in batches]
    for key, value in batches[0].items():
        if isinstance(value, torch.Tensor) and value.dim() > 0:
            parts: Any = torch.cat([batch[key] for batch in batches])[order].split(size)
        elif isinstance(value, list):
            rows = [row for batch in batches for row in batch[key]]
            parts = [[rows[i] for i in order[start : start + size]] for start in range(0, len(order), size)]
        else:  # a value of the whole generation batch
            parts = [value] * len(batches)
        for batch, part in zip(grouped, parts, strict=True):
            batch[key] = part
    return grouped


def has_ended(batch: dict[str, Any], end_token_ids: list[int]) -> torch.Tensor:
    """`(B, 1)`, true for completions whose last token is an end token; the others were truncated."""
    ends = torch.tensor(end_token_ids, device=batch["completion_ids"].device)
    last = batch["completion_mask"].sum(1, keepdim=True) - 1  # no completion is empty
    return torch.isin(batch["completion_ids"].gather(1, last), ends)
