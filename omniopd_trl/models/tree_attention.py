# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Hidden states of rows that hold several continuations of one text, with a mask for each position."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate.utils import is_peft_model
from torch import nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedModel

from omniopd_trl.errors import first_line

# Largest relative difference between the states of a packed row and of separate rows that is rounding.
_ROUNDING = {torch.float32: 1e-3, torch.float64: 1e-3}
_ROUNDING_IN_HALF = 0.05
# Positions of a block of FlexAttention's masks.
_BLOCK = 128
# Kernels that PyTorch may compile for one attention. A run needs one for each of causal, padded and packed rows, with
# and without gradients, for one row and for more, for its first length and for any. After 8, which is PyTorch's limit,
# it would compute with whole matrices of scores instead.
_KERNELS = 64


@dataclass(frozen=True)
class TreeMask:
    """Who attends to whom in rows that hold several continuations of one text.

    A position attends to itself and to all before it, except those from `start` to before `end`. For a token of a
    continuation, `start` is where the continuation leaves the text, and `end` is the column of its first token. For a
    token of the text both are 0. Padding behind the text or behind the continuations needs no entry: only padding
    attends to it.

    Attributes:
        start: `(R, L)`, columns of the row.
        end: `(R, L)`, likewise.
    """

    start: torch.Tensor
    end: torch.Tensor

    @property
    def rule(self) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
        """A function of row, head, query and key, which are broadcast: whether the query attends to the key.

        It is FlexAttention's `mask_mod`, of which kernels are compiled.
        """
        start, end = self.start, self.end

        def attends(row: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            return (key <= query) & ((key < start[row, query]) | (key >= end[row, query]))

        return attends

    def of_queries(self, first: int, last: int) -> torch.Tensor:
        """`(R, last - first, L)`, true where these queries attend to a key."""
        num_rows, length = self.start.shape
        row, query, key = (
            torch.arange(low, high, device=self.start.device)
            for low, high in ((0, num_rows), (first, last), (0, length))
        )
        return self.rule(row[:, None, None], row.new_zeros(()), query[:, None], key)

    def dense(self) -> torch.Tensor:
        """`(R, 1, L, L)`, true where a position attends to another."""
        return self.of_queries(0, self.start.size(1))[:, None]

    def blocks(self) -> BlockMask:
        """The mask for FlexAttention, without the L x L bytes for each row that `create_block_mask` takes.

        Its compiled form takes none either, but needs further compilations.
        """
        length = self.start.size(1)
        num_blocks = -(-length // _BLOCK)
        counts = []  # of pairs that attend, in the blocks of a row of blocks, (R, num_blocks)
        for first in range(0, length, _BLOCK):
            attends = self.of_queries(first, min(first + _BLOCK, length))
            padded = nn.functional.pad(attends, (0, num_blocks * _BLOCK - length))
            counts.append(padded.unflatten(-1, (num_blocks, _BLOCK)).sum((1, 3)))
        count = torch.stack(counts, 1)[:, None]
        whole = count == _BLOCK**2

        def listed(kind: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            """Number and indices of the blocks of this kind in each row of blocks."""
            return kind.sum(-1).int(), kind.int().argsort(dim=-1, descending=True, stable=True).int()

        return BlockMask.from_kv_blocks(
            *listed((count > 0) & ~whole),
            *listed(whole),
            BLOCK_SIZE=_BLOCK,
            mask_mod=self.rule,
            seq_lengths=(length, length),
        )


def last_hidden_states(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | TreeMask,
    position_ids: torch.Tensor,
) -> torch.Tensor:
    """The states before the LM head, `(R, L, H)`.

    Args:
        model: a causal language model, or its PEFT wrapper.
        input_ids: `(R, L)`.
        attention_mask: `(R, L)`, true on tokens, or the mask of packed rows, for a model for which [`why_not_packed`]
            is `None`.
        position_ids: `(R, L)`.
    """
    plain = model.get_base_model() if is_peft_model(model) else model
    mask: torch.Tensor | BlockMask
    if isinstance(attention_mask, torch.Tensor):
        mask = attention_mask
    elif _is_flex(plain):
        mask = attention_mask.blocks()
    else:
        mask = tree_mask(plain, attention_mask.dense())
    outputs = plain.base_model(input_ids=input_ids, attention_mask=mask, position_ids=position_ids, use_cache=False)
    states: torch.Tensor = outputs.last_hidden_state
    return states


def takes_masks(model: PreTrainedModel) -> bool:
    """Whether the model's attention takes a tensor with a mask for each position."""
    return model.config._attn_implementation in ("sdpa", "eager")


def _is_flex(model: PreTrainedModel) -> bool:
    return model.config._attn_implementation == "flex_attention"


@contextmanager
def sampling_attention(model: PreTrainedModel) -> Iterator[None]:
    """Context in which a model with FlexAttention samples with `sdpa`.

    FlexAttention would compile further kernels for prompts and for single tokens, and takes no tensor as a mask.
    Training cannot change the attention in this way: gradient checkpointing calls it again in the backward pass.

    Args:
        model: a causal language model, or its PEFT wrapper.
    """
    if not _is_flex(model):
        yield
        return
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation("flex_attention")


def tree_mask(model: PreTrainedModel, mask: torch.Tensor) -> torch.Tensor:
    """The form in which the model's attention takes the mask `(R, 1, Q, L)`, true where a position attends."""
    if model.config._attn_implementation != "eager":
        return mask
    # It adds the mask to its scores.
    return torch.zeros_like(mask, dtype=model.dtype).masked_fill(~mask, torch.finfo(model.dtype).min)


@contextmanager
def attention_kernels(model: PreTrainedModel) -> Iterator[None]:
    """Context for forward passes, in which PyTorch may compile all kernels that FlexAttention needs.

    Args:
        model: a causal language model, or its PEFT wrapper.
    """
    if not _is_flex(model):
        yield
        return
    config = torch._dynamo.config
    with config.patch(recompile_limit=max(config.recompile_limit, _KERNELS)):  # each thread has its own value
        yield


def difference_of(model: PreTrainedModel, found: torch.Tensor, expected: torch.Tensor) -> str | None:
    """The relative difference of two results of the model, if it is more than rounding."""
    is_half = torch.is_autocast_enabled(model.device.type) or expected.dtype not in _ROUNDING
    limit = _ROUNDING_IN_HALF if is_half else _ROUNDING[expected.dtype]
    difference = ((found - expected).float().norm() / expected.float().norm()).item()
    return None if difference <= limit else f"{difference:.2g}"


def attention_window(model: PreTrainedModel) -> int | None:
    """Number of positions that every layer's attention reaches back; `None` without a limit in the configuration."""
    config = model.config.get_text_config()
    if set(getattr(config, "layer_types", None) or ["unknown"]) == {"full_attention"}:
        return None
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return min((window for window in windows if window), default=None)


@torch.no_grad()
def why_not_packed(
    model: PreTrainedModel, text: Sequence[int] = (1, 2, 3, 4, 5, 6), length: int | None = None
) -> str | None:
    """Why the model cannot compute several continuations in one row; `None` when it can.

    A recurrent layer, or an attention without masks, would silently read what the mask hides. A window over columns
    would hide what a continuation far behind its text has to read. The states of a continuation of three tokens at the
    end of a packed row are therefore compared with those of a separate row. The model should be in evaluation mode.

    Args:
        model: a causal language model, or its PEFT wrapper.
        text: token ids of the text, at least two. The continuation leaves it in the middle.
        length: length of the packed row, at least that of text and continuation, which is the default. Between the two
            is padding.
    """
    if not takes_masks(model) and not _is_flex(model):
        return f"attn_implementation={model.config._attn_implementation!r} takes no mask of this form"
    device, start, end = model.device, len(text) // 2, len(text)
    suffix = [*reversed([*text, *text])][:3]
    first = max(length or 0, end + len(suffix)) - len(suffix)
    hidden = torch.zeros(2, 1, first + len(suffix), dtype=torch.long, device=device)
    hidden[:, 0, first:] = torch.tensor([[start], [first]])
    positions = [*range(end), *[end - 1] * (first - end), *range(start, start + len(suffix))]
    row = [*text[:start], *suffix]

    def states(ids: list[int], mask: torch.Tensor | TreeMask, positions: list[int]) -> torch.Tensor:
        where = torch.tensor([positions], device=device)
        return last_hidden_states(model, torch.tensor([ids], device=device), mask, where)[0]

    is_token = torch.ones(1, len(row), dtype=torch.bool, device=device)
    expected = states(row, is_token, [*range(len(row))])[start:]
    try:
        found = states([*text, *[text[-1]] * (first - end), *suffix], TreeMask(*hidden), positions)[first:]
    except Exception as error:  # whatever a model does with a mask that it does not know
        return f"its forward refuses the mask ({type(error).__name__}: {first_line(error)})"
    difference = difference_of(model, found, expected)
    return difference and f"the states of packed branches differ by {difference} from those of separate rows"
