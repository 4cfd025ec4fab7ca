# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Whether a model can generate for rows of different lengths, which are padded on the left."""

from typing import Any

import torch
from transformers import GenerationConfig

from omniopd_trl.errors import first_line

# Largest relative difference of centered logits that is rounding, with TF32 and in 16 bits.
_ROUNDING, _ROUNDING_IN_HALF = 0.01, 0.1


@torch.no_grad()
def why_not_padded(model: Any, token_ids: list[int]) -> str | None:
    """Why the model cannot generate for padded rows; `None` when it can, or when its `generate` returns no logits.

    A recurrent layer may read the padding, and positions may count it. The logits of two tokens that are generated
    after a row that is padded for a longer one are therefore compared with those of a forward pass of the row alone.
    The model should be in evaluation mode, and without defaults of generation.

    Args:
        model: a causal language model, or its PEFT wrapper.
        token_ids: a text of at least two tokens.
    """
    short = token_ids[: len(token_ids) // 2]
    padding = len(token_ids) - len(short)
    config = GenerationConfig(
        max_new_tokens=2,
        min_new_tokens=2,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=token_ids[0],
        disable_compile=True,
    )
    rows = [token_ids, [*token_ids[-padding:], *short]]
    masks = [[1] * len(token_ids), [0] * padding + [1] * len(short)]
    inputs, mask = (torch.tensor(part, device=model.device) for part in (rows, masks))
    try:
        output = model.generate(input_ids=inputs, attention_mask=mask, generation_config=config)
    except Exception as error:
        return f"its `generate` fails ({type(error).__name__}: {first_line(error)})"
    if isinstance(output, torch.Tensor):  # the `generate` of a model's repository, which returns no logits
        return None
    found = torch.stack([logits[1] for logits in output.logits])
    alone = torch.tensor([[*short, output.sequences[1, -2]]], device=model.device)
    expected = model(input_ids=alone, use_cache=False).logits[0, -2:]
    # Some models give impossible tokens the least number there is.
    found, expected = (each.float().log_softmax(-1).clamp(min=-100) for each in (found, expected))
    found, expected = (each - each.mean(-1, keepdim=True) for each in (found, expected))
    difference = ((found - expected).norm() / expected.norm()).item()
    is_half = torch.is_autocast_enabled(model.device.type) or torch.finfo(model.dtype).bits <= 16
    if difference <= (_ROUNDING_IN_HALF if is_half else _ROUNDING):
        return None
    return f"its logits after a row that is padded on the left differ by {difference:.2g} from those of the row alone"
