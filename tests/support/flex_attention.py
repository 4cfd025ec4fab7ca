# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""FlexAttention on a CPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.nn.attention import flex_attention

FLEX = {"model_init_kwargs": {"attn_implementation": "flex_attention"}}


@contextmanager
def reference_flex_attention() -> Iterator[None]:
    """Context in which a CPU computes FlexAttention, and its gradients, by PyTorch's reference implementation.

    PyTorch refuses gradients on a CPU by a check of the device. Without the check and without the compiler, it
    computes whole matrices of scores and their gradients from the same mask. The kernels of a GPU are other code.
    """
    with (
        patch.object(flex_attention, "_validate_device", lambda *_: None),
        torch.compiler.set_stance("force_eager"),
    ):
        yield


def materialized(mask: Any) -> torch.Tensor:
    """The pairs that a `BlockMask` allows, `(R, 1, L, L)`.

    As kernels read it: listed blocks are masked by `mask_mod`, listed full blocks are not, and others are skipped.
    """
    num_rows, _, length, _ = mask.shape
    size = mask.BLOCK_SIZE[0]
    position = torch.arange(length)
    by_rule = mask.mask_mod(
        torch.arange(num_rows)[:, None, None], torch.tensor(0), position[:, None].expand(length, 1), position
    )
    found = torch.zeros(num_rows, length, length, dtype=torch.bool)
    for is_full, numbers, indices in (
        (False, mask.kv_num_blocks, mask.kv_indices),
        (True, mask.full_kv_num_blocks, mask.full_kv_indices),
    ):
        for row in range(num_rows):
            for i, number in enumerate(numbers[row, 0].tolist()):
                for j in indices[row, 0, i, :number].tolist():
                    block = row, slice(i * size, (i + 1) * size), slice(j * size, (j + 1) * size)
                    assert not found[block].any(), "a block is listed twice"
                    found[block] = True if is_full else by_rule[block]
    return found[:, None]
