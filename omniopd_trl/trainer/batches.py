# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Batches of trajectories: TRL's format, the packed format of the forward passes, and the split into micro-batches."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import zip_longest
from typing import Any

import torch
from torch import nn
from trl.trainer.utils import flush_left

from omniopd_trl.method.branches import Suffix
from omniopd_trl.models.tree_attention import TreeMask

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
        imitation: `(B, L - 1)`, the weight in the imitation loss: 0 on targets that no rollout shares.
        advantages: `(B, L - 1)`, weight of the verifier's policy gradient on completion targets.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    targets: torch.Tensor
    completion: torch.Tensor
    audited: torch.Tensor
    weights: torch.Tensor
    imitation: torch.Tensor
    advantages: torch.Tensor

    @classmethod
    def of(cls, batch: dict[str, Any], pad_token_id: int, pad_to_multiple_of: int | None = None) -> "PackedBatch":
        """Join prompts and completions.

        Args:
            batch: a batch with the keys `TOKEN_KEYS`, with `imitation`, `(B, T)`, if rollouts are imitated, and with
                `advantages`, `(B, T)`, if a verifier trains.
            pad_token_id: token that pads rows to a multiple of `pad_to_multiple_of`.
            pad_to_multiple_of: the rows are padded to a multiple of this length; `None` for no padding.
        """
        prompt_padding = torch.zeros_like(batch["prompt_mask"])
        added = [batch.get(name, torch.zeros_like(batch["weights"])) for name in ("imitation", "advantages")]
        mask, input_ids, completion, audited, *weights = flush_left(
            torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
            torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
            torch.cat([prompt_padding, batch["completion_mask"]], dim=1),
            torch.cat([prompt_padding, batch["audited_mask"].to(prompt_padding.dtype)], dim=1),
            torch.cat([prompt_padding.float(), batch["weights"]], dim=1),
            *(torch.cat([prompt_padding.float(), one], dim=1) for one in added),
        )
        if pad_to_multiple_of is not None:
            padding = -mask.size(1) % pad_to_multiple_of
            mask, completion, audited, *weights = (
                nn.functional.pad(x, (0, padding)) for x in (mask, completion, audited, *weights)
            )
            input_ids = nn.functional.pad(input_ids, (0, padding), value=pad_token_id)
        masks = completion[:, 1:].bool(), audited[:, 1:].bool()
        return cls(input_ids, mask, input_ids[:, 1:], *masks, *(one[:, 1:] for one in weights))

    @property
    def unaudited(self) -> torch.Tensor:
        """`(B, L - 1)`, true where the target is a completion token outside of every audited chunk."""
        return self.completion & ~self.audited

    @property
    def trained(self) -> torch.Tensor:
        """`(B, L - 1)`, true where the target's log-probability is in the loss, or its chunk was audited."""
        return self.audited | (self.advantages != 0)

    def select(self, rows: torch.Tensor) -> "PackedBatch":
        """The selected rows as a batch."""
        return PackedBatch(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})


@dataclass(frozen=True)
class BranchedBatch:
    """A packed batch with the branches and imitated rollouts of its trajectories, as the inputs of one forward pass.

    The rows and columns of the packed batch come first. A branch or rollout is its *suffix*: what it does not share
    with its trajectory. Its tokens have the positions that they would have in the trajectory's place, and attend to
    the trajectory before the suffix and to the suffix so far.

    Attributes:
        input_ids: `(R, L)`.
        attention_mask: `(R, L)`, true on tokens, or the mask of packed rows.
        position_ids: `(R, L)`.
        predictors: `(2, S)`, row and column of the position that predicts each token of the suffixes.
        targets: `(S,)`, these tokens.
        weights: `(S,)`, their weights in the chunk loss.
        sampling_logprobs: `(S,)`, log-probabilities that they were sampled with, in nats. NaN where they are unknown.
        imitation: `(S,)`, their weights in the imitation loss.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | TreeMask
    position_ids: torch.Tensor
    predictors: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    sampling_logprobs: torch.Tensor
    imitation: torch.Tensor

    @classmethod
    def of(
        cls,
        tokens: PackedBatch,
        prompt_lengths: Sequence[int],
        suffixes: Sequence[Sequence[Suffix]],
        pad_token_id: int,
        is_packed: bool,
    ) -> "BranchedBatch":
        """Add branches to a packed batch.

        Args:
            tokens: the B trajectories.
            prompt_lengths: number of tokens of each prompt.
            suffixes: the suffixes of each trajectory; `start` is a position in the completion.
            pad_token_id: token that fills up rows.
            is_packed: whether suffixes are behind their trajectory in one row, so a prefix is computed once. Otherwise
                each suffix has a row of its own, after the rows of the batch, that begins with its prefix.
        """
        device = tokens.input_ids.device
        num_rows, width = tokens.input_ids.shape
        branches = [
            (row, prompt_lengths[row] + suffix.start, suffix)
            for row, of_row in enumerate(suffixes)
            for suffix in of_row
        ]
        added: list[list[int]] = [[] for _ in range(num_rows)]  # tokens behind each row, and then the other rows
        places = []  # row and column of the first token of each suffix
        for row, start, suffix in branches:
            inputs = suffix.token_ids[:-1]  # the last token predicts nothing
            if is_packed or not inputs:
                places.append((row, width + len(added[row])))
                added[row] += inputs
            else:
                places.append((len(added), start))
                added.append([*tokens.input_ids[row, :start].tolist(), *inputs])
        offsets = [width] * num_rows + [0] * (len(added) - num_rows)
        length = max(offset + len(ids) for offset, ids in zip(offsets, added, strict=True))
        input_ids = torch.full((len(added), length), pad_token_id, device=device)
        is_token = torch.zeros(len(added), length, dtype=torch.bool, device=device)
        input_ids[:num_rows, :width], is_token[:num_rows, :width] = tokens.input_ids, tokens.attention_mask.bool()
        for row, (offset, ids) in enumerate(zip(offsets, added, strict=True)):
            input_ids[row, offset : offset + len(ids)] = torch.tensor(ids, dtype=torch.long)
            is_token[row, offset : offset + len(ids)] = True
        # Padding gets no position beyond those of the trajectories: an embedding of positions may end there, and some
        # models scale all positions by the highest one.
        position_ids = torch.arange(length, device=device).clamp(max=width - 1).repeat(len(added), 1)
        mask: torch.Tensor | TreeMask = is_token
        if is_packed:
            hidden = torch.zeros(2, len(added), length, dtype=torch.long)
            for (row, start, suffix), (_, first) in zip(branches, places, strict=True):
                size = len(suffix.token_ids) - 1
                position_ids[row, first : first + size] = torch.arange(start, start + size)
                hidden[:, row, first : first + size] = torch.tensor([[start], [first]])
            mask = TreeMask(*hidden.to(device))
        predictors = [
            (row, start - 1) if t == 0 else (other, first + t - 1)
            for (row, start, suffix), (other, first) in zip(branches, places, strict=True)
            for t in range(len(suffix.token_ids))
        ]
        flat = [
            (token, suffix.weight, math.nan if logprob is None else logprob, copied or 0.0)
            for _, _, suffix in branches
            for token, logprob, copied in zip_longest(suffix.token_ids, suffix.sampling_logprobs, suffix.imitation)
        ]
        targets, weights, sampled, imitation = zip(*flat, strict=True) if flat else ((), (), (), ())
        parts = (
            torch.tensor(predictors, dtype=torch.long).reshape(-1, 2).T,
            torch.tensor(targets, dtype=torch.long),
            *map(torch.tensor, (weights, sampled, imitation)),
        )
        return cls(input_ids, mask, position_ids, *(part.to(device) for part in parts))


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
