# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Hidden states of rows that hold several continuations of one text, with a mask for each position."""

import torch
from accelerate.utils import is_peft_model
from transformers import PreTrainedModel

from omniopd_trl.errors import first_line

# Largest relative difference between the states of a packed row and of separate rows that is rounding.
_ROUNDING = {torch.float32: 1e-3, torch.float64: 1e-3}
_ROUNDING_IN_HALF = 0.05


def last_hidden_states(
    model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor
) -> torch.Tensor:
    """The states before the LM head, `(R, L, H)`.

    Args:
        model: a causal language model, or its PEFT wrapper.
        input_ids: `(R, L)`.
        attention_mask: `(R, L)`, true on tokens, or `(R, 1, L, L)`, true where a position attends to another. Each
            position must attend to one at least.
        position_ids: `(R, L)`.
    """
    plain = model.get_base_model() if is_peft_model(model) else model
    if attention_mask.dim() == 4:
        attention_mask = tree_mask(plain, attention_mask)
    outputs = plain.base_model(
        input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
    )
    states: torch.Tensor = outputs.last_hidden_state
    return states


def takes_masks(model: PreTrainedModel) -> bool:
    """Whether the model's attention takes a mask for each position."""
    return model.config._attn_implementation in ("sdpa", "eager")


def tree_mask(model: PreTrainedModel, mask: torch.Tensor) -> torch.Tensor:
    """The form in which the model's attention takes the mask `(R, 1, Q, L)`, true where a position attends."""
    if model.config._attn_implementation != "eager":
        return mask
    # It adds the mask to its scores.
    return torch.zeros_like(mask, dtype=model.dtype).masked_fill(~mask, torch.finfo(model.dtype).min)


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
def why_not_packed(model: PreTrainedModel) -> str | None:
    """Why the model cannot compute several continuations in one row; `None` when it can.

    A recurrent layer, or an attention without masks, would silently read what the mask hides. The states of a short
    packed row are therefore compared with those of separate rows. The model should be in evaluation mode.
    """
    if not takes_masks(model):
        return f"attn_implementation={model.config._attn_implementation!r} takes no mask of this form"
    vocabulary = model.get_input_embeddings().num_embeddings
    trunk, suffix, start = [1, 2, 3, 4, 5, 6], [7, 8, 9], 3
    packed = [*trunk, *suffix]
    mask = torch.ones(len(packed), len(packed), dtype=torch.bool).tril()
    mask[len(trunk) :, start : len(trunk)] = False
    positions = [*range(len(trunk)), *range(start, start + len(suffix))]
    row = [*trunk[:start], *suffix]

    def states(ids: list[int], mask: torch.Tensor, positions: list[int]) -> torch.Tensor:
        device = model.device
        input_ids = torch.tensor([ids], device=device) % vocabulary
        return last_hidden_states(model, input_ids, mask.to(device), torch.tensor([positions], device=device))[0]

    expected = states(row, torch.ones(1, len(row), dtype=torch.bool), [*range(len(row))])[start:]
    try:
        found = states(packed, mask[None, None], positions)[len(trunk) :]
    except Exception as error:  # whatever a model does with a mask that it does not know
        return f"its forward refuses the mask ({type(error).__name__}: {first_line(error)})"
    difference = difference_of(model, found, expected)
    return difference and f"the states of packed branches differ by {difference} from those of separate rows"
