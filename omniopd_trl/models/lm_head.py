# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities, entropies and KL from hidden states, with TRL's chunked kernels.

No tensor of shape `(T, V)` is created: the kernels project tiles of the hidden states through the LM head.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
from trl.kernels.chunked_logprob import ChunkedLogProbFunction
from trl.trainer.utils import maybe_gather_lm_head_ctx

# Width of a tile in vocabulary entries. With the kernel's 4,096 tokens a tile is 64 MiB in float32.
VOCAB_TILE = 4096

# Tokens per call of the divergence kernel without Triton. The fallback in torch needs about ten temporaries of a
# tile's size, and the tile's width is fixed: a temporary takes 32 MiB with 256 tokens and 512 MiB with 4,096. Each
# call also accumulates the head's gradient, so fewer tokens per call would cost time.
TORCH_TOKENS = 256


@dataclass(frozen=True)
class LMHead:
    """The last linear layer of a causal language model, with the scaling of its logits.

    Attributes:
        weight: `(V, H)`.
        bias: `(V,)` or `None`.
        logit_scale: factor on the logits.
        softcap: logits become `softcap * tanh(logits / softcap)`, after the scale. `None` for no cap.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    logit_scale: float
    softcap: float | None


@contextmanager
def lm_head_of(model: PreTrainedModel) -> Iterator[LMHead]:
    """The complete LM head of `model`, for every back end.

    Outside the layer's own forward, ZeRO-3 leaves an empty weight and FSDP2 a `DTensor`. The kernels would silently
    compute with either. Inside this context the weight is complete.
    """
    head = model.get_output_embeddings()
    # PEFT's wrapper of a head with trainable tokens has no `bias`, and computes without the one of the layer inside.
    weight, bias = head.weight, getattr(head, "bias", None)
    with maybe_gather_lm_head_ctx(weight, bias):
        if isinstance(weight, DTensor):
            weight = weight.full_tensor()
            bias = bias.full_tensor() if bias is not None else None
        config = model.config.get_text_config()
        yield LMHead(weight, bias, logit_scale(config), softcap(config))


def logit_scale(config: PretrainedConfig) -> float:
    """The factor on the logits of a model, under the name that its architecture uses."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):  # Cohere, Muse Glimmer, Falcon-H1
        scale = getattr(config, name, None)
        if scale is not None:
            return float(scale)
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    # HyperCLOVA X multiplies by it; Granite and MiniCPM3 divide.
    return float(scaling) if config.model_type == "hyperclovax" else 1.0 / float(scaling)


def softcap(config: PretrainedConfig) -> float | None:
    """The soft cap of the logits of a model, `None` without one."""
    caps = (getattr(config, name, None) for name in ("final_logit_softcapping", "logits_soft_cap"))  # RecurrentGemma
    return next((float(cap) for cap in caps if cap is not None), None)


def logprobs_of(
    hidden: torch.Tensor, head: LMHead, targets: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of the targets and full-vocabulary entropies, of the policy at `temperature`.

    Args:
        hidden: `(N, H)`, the states that predict the targets.
        head: the model's LM head.
        targets: `(N,)`, token ids.
        temperature: sampling temperature, above 0.

    Returns:
        Log-probabilities and entropies in nats, both `(N,)` and float32. Gradients flow through the log-probabilities.
    """
    tile = min(VOCAB_TILE, head.weight.size(0))  # the kernel allocates a whole tile even for a small vocabulary
    logprobs, entropy, *_ = ChunkedLogProbFunction.apply(
        hidden, head.weight, head.bias, targets, temperature, tile, head.softcap, head.logit_scale, ("entropy",)
    )
    return logprobs, entropy


def kl_to_reference(
    hidden: torch.Tensor, head: LMHead, ref_hidden: torch.Tensor, ref_head: LMHead, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact `KL(ref || theta)` per token, over the full vocabulary (the anchor of Eq. 8).

    Args:
        hidden: `(N, H)`, the student's states; the gradient flows through them and through `head`.
        head: the student's LM head.
        ref_hidden: `(N, H_ref)`, the reference's states at the same tokens.
        ref_head: the reference's LM head.
        temperature: sampling temperature, applied to both distributions.

    Returns:
        KL and the student's entropy in nats, both `(N,)` and float32.
    """
    forward_kl = 0.0  # the kernel's interpolation weight for KL(second || first)

    def divergence(student: torch.Tensor, reference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return ChunkedDivergenceFunction.apply(
            student,
            head.weight,
            head.bias,
            reference,
            ref_head.weight,
            ref_head.bias,
            forward_kl,
            temperature,
            head.logit_scale,
            head.softcap,
            ref_head.logit_scale,
            ref_head.softcap,
        )

    # Under ZeRO-3 each call gathers the head once more in its backward. Processes with different numbers of calls
    # would wait for each other forever.
    if hidden.device.type in ("cuda", "xpu") or is_deepspeed_zero3_enabled():
        return divergence(hidden, ref_hidden)
    pairs = zip(hidden.split(TORCH_TOKENS), ref_hidden.split(TORCH_TOKENS), strict=True)
    parts = [divergence(*pair) for pair in pairs]
    kl, entropy = (torch.cat(column) for column in zip(*parts, strict=True))
    return kl, entropy
