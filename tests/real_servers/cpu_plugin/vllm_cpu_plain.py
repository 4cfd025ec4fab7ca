# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""A plugin that vLLM loads by its entry point, in each of its processes: linear weights stay plain parameters.

On the CPU vLLM packs them for oneDNN. A later update of the weights then reaches some layers and not others, without a
word: the server says that it reloaded them, and a model with tied embeddings answers from both old and new weights.
"""


def register() -> None:
    """Compute linear layers with torch, from the parameters themselves."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    import torch
    from vllm.model_executor.layers import utils

    def plain(layer, remove_weight=False):
        layer.cpu_linear = torch.nn.functional.linear

    utils.dispatch_cpu_unquantized_gemm = plain
