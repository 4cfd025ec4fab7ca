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

from omniopd_trl.method.importance import SamplingFilters, kept_log_mass, lowest_kept_logit

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


# Logits per block in the function below, which needs whole rows of the vocabulary: 64 MiB in float32, and four times
# that with its temporaries.
_BLOCK_LOGITS = 2**24


def log_kept_mass(
    hidden: torch.Tensor, head: LMHead, targets: torch.Tensor, temperature: float, filters: SamplingFilters
) -> torch.Tensor:
    """`log Z` of each token: the probability that the sampling filters keep; see `method.importance.kept_log_mass`.

    Args:
        hidden: `(N, H)`, the states that predict the targets; the gradient flows through them and through `head`.
        head: the model's LM head.
        targets: `(N,)`, the sampled tokens. They count as kept even if rounding puts them below the threshold.
        temperature: sampling temperature, above 0.
        filters: filters of the sampler.

    Returns:
        `(N,)`, float32, in nats, at most 0.
    """
    scales = (head.logit_scale, head.softcap, temperature)
    result: torch.Tensor = _LogKeptMass.apply(hidden, head.weight, head.bias, targets, scales, filters)
    return result


class _LogKeptMass(torch.autograd.Function):
    """Blocks of tokens, whose logits are computed again in the backward."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, scales, filters):
        is_cast = torch.is_autocast_enabled(hidden.device.type)
        ctx.dtype = torch.get_autocast_dtype(hidden.device.type) if is_cast else hidden.dtype
        ctx.scales = scales
        lowest, mass = torch.zeros(2, len(hidden), device=hidden.device)
        for rows in _blocks(hidden, weight):
            logits, _ = _logits(hidden[rows], weight, bias, ctx.dtype, *scales)
            sampled = logits.gather(1, targets[rows, None])[:, 0]
            threshold = torch.minimum(lowest_kept_logit(logits, filters), sampled)
            # In the backward the logits may be rounded differently.
            lowest[rows] = threshold - 1e-6 * (1 + threshold.abs())
            mass[rows] = kept_log_mass(logits, lowest[rows])
        ctx.save_for_backward(hidden, weight, bias, lowest)
        return mass

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, bias, lowest = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        with maybe_gather_lm_head_ctx(weight, bias):  # under ZeRO-3 the head was released after the forward
            grad_hidden = torch.zeros_like(hidden, dtype=torch.float32) if needs_hidden else None
            grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
            grad_bias = torch.zeros_like(bias, dtype=torch.float32) if needs_bias else None
            for rows in _blocks(hidden, weight):
                logits, slope = _logits(hidden[rows], weight, bias, ctx.dtype, *ctx.scales)
                kept = logits.masked_fill(logits < lowest[rows, None], float("-inf"))
                # d log Z / d logits = softmax over the kept tokens - softmax over all
                grad_product = (kept.softmax(-1) - logits.softmax(-1)) * slope * grad[rows, None]
                if grad_hidden is not None:
                    grad_hidden[rows] = grad_product @ weight.float()
                if grad_weight is not None:
                    grad_weight += grad_product.T @ hidden[rows].float()
                if grad_bias is not None:
                    grad_bias += grad_product.sum(0)
        grads = zip((grad_hidden, grad_weight, grad_bias), (hidden, weight, bias), strict=True)
        return (*(None if g is None else g.to(x.dtype) for g, x in grads), None, None, None)


def _blocks(hidden: torch.Tensor, weight: torch.Tensor) -> Iterator[slice]:
    size = max(1, _BLOCK_LOGITS // weight.size(0))
    return (slice(start, start + size) for start in range(0, len(hidden), size))


def _logits(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor | float]:
    """Logits at the sampling temperature, `(n, V)` in float32, and their derivative by the projection."""
    product = hidden.to(dtype) @ weight.to(dtype).T
    if bias is not None:
        product = product + bias.to(dtype)
    logits = product.float() * logit_scale
    slope: torch.Tensor | float = logit_scale / temperature
    if softcap is not None:
        bent = torch.tanh(logits / softcap)
        logits, slope = softcap * bent, slope * (1 - bent * bent)
    return logits / temperature, slope
